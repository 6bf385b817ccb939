"""`headinfer chat`: a conversation in the terminal, with one cache for all of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from headinfer.cli import form_options as form
from headinfer.cli import options as opt
from headinfer.cli import session_options as sessions
from headinfer.cli.answer import Request
from headinfer.cli.console import report, reporting_errors, stderr_console
from headinfer.cli.interrupt import Stopped
from headinfer.cli.load import (
    DEMO_MODEL,
    NamedSource,
    begin_loading,
    calm_transformers,
    max_positions,
    prepare_cpu,
    share_cores,
)
from headinfer.cli.render import print_plan
from headinfer.cli.sampling import flag
from headinfer.cli.sampling_options import BEAMS, generation_options, with_sampling
from headinfer.cli.stages import Stages
from headinfer.cli.talk.commands import Commands
from headinfer.cli.talk.conversation import SAVE_ELSEWHERE, Conversation, Talker
from headinfer.cli.talk.lines import Lines, open_lines
from headinfer.cli.talk.loop import converse
from headinfer.errors import HeadInferError
from headinfer.generation.gpus import Gpus
from headinfer.generation.model import choose_device, load_config, load_model, load_tokenizer
from headinfer.gguf_models import unpacked_dtype


@opt.with_flags()
@with_sampling(*BEAMS)
def chat(
    *,
    prompt_file: Annotated[
        list[str] | None,
        opt.prompt_option(
            "--prompt-file",
            "-f",
            help_text="A UTF-8 text file that comes before the first message; may be repeated.",
            metavar="PATH",
        ),
    ] = None,
    session: sessions.Session = None,
    system: form.System = None,
    chat_template_kwargs: form.ChatTemplateKwargs = None,
    raw: Annotated[
        bool, opt.prompt_option("--raw", help_text="Have the model go on with what is written.")
    ] = False,
    allow_long_prompt: Annotated[
        bool,
        opt.prompt_option(
            "--allow-long-prompt", help_text="Go on beyond the positions of the model."
        ),
    ] = False,
    model: opt.TrainedModel = DEMO_MODEL,
    dtype: opt.Dtype = opt.DtypeChoice.AUTO,
    load_in: form.LoadIn = None,
    adapter: form.Adapter = None,
    gpus: form.GpuCount = None,
    flags: dict[str, Any],
    local_files_only: form.LocalFilesOnly = False,
    trust_remote_code: form.TrustRemoteCode = False,
    threads: opt.Threads = None,
    sampling: dict[str, Any],
    stop: form.Stop = None,
    seed: form.Seed = None,
    save_session: sessions.SaveSession = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Converse with a model: each message reads only what is new.

    One KV cache has the whole conversation. Answers go to stdout as they
    come, all else to stderr. Lines that are piped to stdin are messages, too.

    [bold]headinfer chat --model ID --prompt-file book.txt[/]
    """
    with reporting_errors(quiet=quiet):
        options = opt.parse_flags(flags)
        sessions.check_sessions(session, save_session, split=(gpus or 1) > 1)
        request = Request(
            generation=generation_options(sampling),
            options=options,
            text="",
            system=system,
            template_values=form.parse_template_values(chat_template_kwargs),
            raw=raw,
            allow_long=allow_long_prompt,
            source=NamedSource(
                name=model,
                local_files_only=local_files_only,
                trust_remote_code=trust_remote_code,
                load_in=load_in.value if load_in else None,
                adapter=adapter,
                unpacked_dtype=unpacked_dtype(dtype.value),
                gpus=Gpus.of(gpus, options),
            ),
            dtype=dtype.value,
            stop=form.parse_stop(stop),
            seed=seed,
            trace=None,
            session=session,
            save_session=save_session,
            threads=threads,
            as_json=False,
            quiet=quiet,
            verbose=verbose,
        )
        console = stderr_console(quiet=quiet)
        lines = open_lines(console)
        with _loaded(request, console) as talker:
            code = _converse(talker, lines, prompt_file or [])
    if code:
        raise typer.Exit(code)


@contextmanager
def _loaded(request: Request, console: Console) -> Iterator[Talker]:
    """Load and attach the model."""
    share_cores()
    with Stages(console) as stages:
        begin_loading(stages, request.source)
        calm_transformers(verbose=request.verbose)
        prepare_cpu(request.threads)
        if request.source.gpus is not None:
            request.source.gpus.prepare()
        device = choose_device(request.options.device)
        if request.source.gpus is not None:
            request.source.gpus.check(device)
        config = load_config(request.source)
        tokenizer = load_tokenizer(request.source)
        model, unused = load_model(request.source, config, dtype=request.dtype, device=device)

        from headinfer.api import attach
    with attach(model, **request.options.keywords() | {"device": device}) as offload:
        talker = Talker(
            request=request,
            console=console,
            model=model,
            tokenizer=tokenizer,
            offload=offload,
            positions=max_positions(config),
        )
        for told in filter(None, (unused, talker.settings(0).note(flag))):
            console.print(f"note: {told}", markup=False)
        dtype = str(model.dtype).removeprefix("torch.")
        print_plan(console, request.source.name, dtype, offload.plan)
        for line in form.loaded_form(request.source, model, offload.plan.shape.weights_bytes):
            console.print(f"  {line}", markup=False)
        yield talker


def _converse(talker: Talker, lines: Lines, files: list[str]) -> int:
    """Converse, and save the session at the end if that is asked for; return the exit code."""
    request, console = talker.request, talker.console
    conversation = Conversation(talker)
    commands = Commands(conversation, stderr_console(), talker.offload.plan)
    if request.session is not None:
        commands.load(request.session)
        if request.system is not None:
            conversation.set_system(request.system)
    for path in files:
        commands.file(path)
    if lines.by_hand:
        console.print("/help lists the commands, Ctrl-D leaves")
    save = request.save_session
    try:
        code = converse(conversation, commands, lines, console)
        unsaved = _save(conversation, save, ending=not lines.by_hand)
        if unsaved and lines.by_hand:
            console.print(f"the conversation goes on: {SAVE_ELSEWHERE}, Ctrl-D leaves")
            code = converse(conversation, commands, lines, console)
            unsaved = _save(conversation, save, ending=True)
    except Stopped:
        console.quiet = True  # the terminal may be gone
        _save(conversation, save, ending=True)
        raise
    return unsaved or code


def _save(conversation: Conversation, path: str | None, *, ending: bool) -> int:
    """Save a session where a path is given, and return the exit code.

    Args:
        conversation: that was saved elsewhere, perhaps: then that is enough.
        path: where to save it.
        ending: whether the conversation cannot go on.
    """
    if path is None or not conversation.messages.said:
        return 0
    try:
        conversation.save(path, ending=ending)
    except HeadInferError as error:
        return 0 if conversation.saved == conversation.messages else report(error)
    return 0
