"""`headinfer serve`: one model for several clients, over HTTP."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from headinfer.cli import form_options as form
from headinfer.cli import options as opt
from headinfer.cli.console import debug_wanted, reporting_errors, stderr_console
from headinfer.cli.load import (
    DEMO_MODEL,
    NamedSource,
    calm_transformers,
    check_model,
    check_trained,
    max_positions,
    prepare_cpu,
    share_cores,
)
from headinfer.cli.render import print_plan
from headinfer.errors import OptionError
from headinfer.generation.gpus import Gpus
from headinfer.generation.model import choose_device, load_config, load_model, load_tokenizer
from headinfer.gguf_models import unpacked_dtype
from headinfer.plan.options import Options
from headinfer.server.origins import check_origins
from headinfer.server.requirements import check_installed
from headinfer.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from headinfer.server.served import Served

_SERVER_PANEL = "Server"
_LIMITS_PANEL = "Limits of requests"
_KEYS_VARIABLE = "HEADINFER_API_KEY"


def _server(*flags: str, help_text: str, metavar: str, **settings: Any) -> Any:
    return typer.Option(
        *flags, help=help_text, metavar=metavar, rich_help_panel=_SERVER_PANEL, **settings
    )


def _limit(*flags: str, help_text: str, metavar: str = "N", **settings: Any) -> Any:
    return typer.Option(
        *flags, help=help_text, metavar=metavar, rich_help_panel=_LIMITS_PANEL, **settings
    )


@opt.with_flags()
def serve(
    *,
    host: Annotated[
        str,
        _server("--host", metavar="NAME", help_text="Address to listen on; 0.0.0.0: all."),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        _server("--port", metavar="N", help_text="Port; 0 takes a free one.", min=0, max=65535),
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        _server(
            "--api-key",
            metavar="KEY",
            help_text="A key that requests must bring; may be repeated.",
            envvar=_KEYS_VARIABLE,
            show_envvar=True,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        _server(
            "--cors-origin",
            metavar="ORIGIN",
            help_text="Whose web pages may call it, as https://NAME; may be repeated; *: all.",
        ),
    ] = None,
    alias: Annotated[
        str | None,
        _server("--alias", metavar="NAME", help_text="What clients call the model."),
    ] = None,
    session_folder: Annotated[
        str | None,
        _server(
            "--session-folder",
            metavar="FOLDER",
            help_text="Where prefixes go that CPU memory has no room for, and all at the end.",
        ),
    ] = None,
    session_folder_size: Annotated[
        str | None,
        _server(
            "--session-folder-size",
            metavar="SIZE",
            help_text="Disk space for it, as 500GiB; the least recently used prefix goes first.",
        ),
    ] = None,
    cache_memory: Annotated[
        str,
        _server(
            "--cache-memory",
            metavar="SIZE",
            help_text="CPU memory for prefixes that are kept, as 64GiB; auto: a share.",
        ),
    ] = "auto",
    ping: Annotated[
        float,
        _server(
            "--ping",
            metavar="SECONDS",
            help_text="Between comments that keep a stream open.",
            min=0.05,
            max=3600,
        ),
    ] = 15.0,
    parallel: Annotated[
        int, _limit("--parallel", help_text="Requests that run in turns.", min=1, max=1024)
    ] = 4,
    queue: Annotated[
        int, _limit("--queue", help_text="Requests that may wait.", min=0, max=100_000)
    ] = 64,
    max_body: Annotated[
        str, _limit("--max-body", metavar="SIZE", help_text="Of a request's body.")
    ] = "256MiB",
    max_new_tokens: Annotated[
        int | None,
        _limit("--max-new-tokens", "-n", help_text="The most tokens of an answer.", min=1),
    ] = None,
    max_seconds: Annotated[
        float | None,
        _limit(
            "--max-seconds",
            metavar="SECONDS",
            help_text="That a request may take, waiting included.",
            min=0.001,
        ),
    ] = None,
    model: form.Model = DEMO_MODEL,
    dtype: opt.Dtype = opt.DtypeChoice.AUTO,
    load_in: form.LoadIn = None,
    adapter: form.Adapter = None,
    gpus: form.GpuCount = None,
    flags: dict[str, Any],
    local_files_only: form.LocalFilesOnly = False,
    trust_remote_code: form.TrustRemoteCode = False,
    threads: opt.Threads = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Serve a model over HTTP: the address to stdout, all else to stderr.

    It answers as OpenAI's /v1/chat/completions, /v1/completions and
    /v1/responses, and is made for prompts that take minutes. Streams tell
    how far they are. What was read stays when a client goes away, and the
    next request goes on from there.

    [bold]headinfer serve --model ID --port 8000[/]
    """
    with reporting_errors(quiet=quiet):
        check_installed()
        options = opt.parse_flags(flags)
        body_bytes = parse_bytes(max_body, "max_body")
        if cache_memory != "auto":
            parse_bytes(cache_memory, "cache_memory")
        most_bytes = 0
        if session_folder_size is not None:
            most_bytes = parse_bytes(session_folder_size, "session_folder_size")
            if session_folder is None:
                raise OptionError("--session-folder-size is of a --session-folder; give that, too")
        keys = tuple(api_key or ())
        if not all(keys):
            raise OptionError("--api-key is empty; give a key, or leave it out")
        origins = check_origins(cors_origin or ())
        check_trained(model)
        source = NamedSource(
            name=model,
            local_files_only=local_files_only,
            trust_remote_code=trust_remote_code,
            load_in=load_in.value if load_in else None,
            adapter=adapter,
            unpacked_dtype=unpacked_dtype(dtype.value),
            gpus=Gpus.of(gpus, options),
        )
        console = stderr_console(quiet=quiet)
        share_cores()
        calm_transformers(verbose=verbose)
        prepare_cpu(threads)
        check_model(console, source)
        # late, so that `--help` answers at once
        from headinfer.server import run
        from headinfer.server.served import Limits, Service
        from headinfer.serving.prefix_folder import lacking_bytes, make_session_folder

        limits = Limits(body_bytes=body_bytes, new_tokens=max_new_tokens, seconds=max_seconds)
        service = Service(alias or model, limits, ping_s=ping)
        address = run.Address(host=host, port=port)
        if session_folder is not None:
            make_session_folder(session_folder)
            if lacking := lacking_bytes(session_folder, most_bytes):
                console.print(
                    f"warning: --session-folder-size {session_folder_size} is "
                    f"{format_bytes(lacking)} more than the disk has; what is read beyond it is "
                    "not kept",
                    markup=False,
                )
        if not keys and not address.is_loopback:
            console.print(
                f"warning: everybody who reaches {host} may use this server; give --api-key",
                markup=False,
            )
        if not keys and "*" in origins:
            console.print(
                "warning: every web page that a browser here shows may use this server; give "
                "--api-key",
                markup=False,
            )
        desk = {
            "running": parallel,
            "waiting": queue,
            "kept_memory": cache_memory,
            "session_folder": session_folder,
            "session_folder_size": session_folder_size,
        }
        run.serve(
            service,
            address,
            lambda: _load(console, service.name, source, dtype.value, options, desk),
            keys=keys,
            origins=origins,
            debug=debug_wanted(),
            verbose=verbose,
            on_listening=lambda url: print(url, flush=True),
            on_ready=lambda: console.print(f"ready: {service.name}", markup=False),
            on_signal=lambda name: console.print(_farewell(name, session_folder), markup=False),
        )


def _farewell(signal_name: str, session_folder: str | None) -> str:
    """Return what is told when a signal ends the server."""
    if session_folder is None:
        kept = "what was read is dropped, as there is no --session-folder"
    else:
        kept = f"what was read is saved to {session_folder}"
    return f"{signal_name}: ending within 30 seconds; {kept}"


def _load(
    console: Console,
    name: str,
    source: NamedSource,
    dtype: str,
    options: Options,
    desk: dict[str, Any],
) -> "Served":
    """Load a model and put it at a desk."""
    from headinfer.api import attach
    from headinfer.server.guide import Guide
    from headinfer.server.parsing import needs_special
    from headinfer.server.served import Served
    from headinfer.serving.desk import Desk

    console.print(f"loading {source.name} ...", markup=False)
    if source.gpus is not None:
        source.gpus.prepare()
    device = choose_device(options.device)
    if source.gpus is not None:
        source.gpus.check(device)
    config = load_config(source)
    tokenizer = load_tokenizer(source)
    model, unused = load_model(source, config, dtype=dtype, device=device)
    if unused is not None:
        console.print(f"note: {unused}", markup=False)
    offload = attach(model, **(options.keywords() | {"device": device}))
    print_plan(console, source.name, str(model.dtype).removeprefix("torch."), offload.plan)
    for line in form.loaded_form(source, model, offload.plan.shape.weights_bytes):
        console.print(f"  {escape(line)}", highlight=False)
    ends = model.generation_config.eos_token_id
    end_ids = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    return Served(
        name=name,
        model=model,
        tokenizer=tokenizer,
        desk=Desk(model, tokenizer, **desk),
        guide=Guide(tokenizer, vocabulary, end_ids),
        positions=max_positions(config),
        spelled=needs_special(model, tokenizer, end_ids),
    )
