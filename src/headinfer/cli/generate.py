"""`headinfer generate`: continue a prompt of any length."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from headinfer.cli import form_options as form
from headinfer.cli import options as opt
from headinfer.cli import ranks
from headinfer.cli import session_options as sessions
from headinfer.cli.answer import Answer, Request
from headinfer.cli.console import reporting_errors, stderr_console
from headinfer.cli.interrupt import Interrupt
from headinfer.cli.load import (
    DEMO_MODEL,
    NamedSource,
    begin_loading,
    calm_transformers,
    max_positions,
    prepare_cpu,
    share_cores,
)
from headinfer.cli.output import check_writable
from headinfer.cli.progress import PrefillBar
from headinfer.cli.prompt import check_length, check_text_length, encode, read_prompt
from headinfer.cli.render import print_plan
from headinfer.cli.sampling import flag
from headinfer.cli.sampling_options import generation_options, with_sampling
from headinfer.cli.stages import Stages
from headinfer.errors import OptionError
from headinfer.generation.gpus import Gpus
from headinfer.generation.model import choose_device, load_config, load_model, load_tokenizer
from headinfer.generation.pace import check_number, drafts_itself
from headinfer.generation.settings import DEFAULT_NEW_TOKENS, settle
from headinfer.gguf_models import unpacked_dtype
from headinfer.ranks.launched import Launched, is_another
from headinfer.units import plural

if TYPE_CHECKING:
    from headinfer.generation.drafts import Drafts


@opt.with_flags()
@with_sampling()
def generate(
    *,
    invocation: typer.Context,
    prompt: Annotated[
        str | None, opt.prompt_option("--prompt", "-p", help_text="The prompt.", metavar="TEXT")
    ] = None,
    prompt_file: Annotated[
        list[str] | None,
        opt.prompt_option(
            "--prompt-file",
            "-f",
            help_text="A UTF-8 text file that comes before the prompt, -: stdin; may be repeated.",
            metavar="PATH",
        ),
    ] = None,
    session: sessions.Session = None,
    system: form.System = None,
    chat_template_kwargs: form.ChatTemplateKwargs = None,
    raw: Annotated[
        bool, opt.prompt_option("--raw", help_text="Leave out the model's chat template.")
    ] = False,
    allow_long_prompt: Annotated[
        bool,
        opt.prompt_option(
            "--allow-long-prompt", help_text="Run prompts beyond the positions of the model."
        ),
    ] = False,
    model: form.Model = DEMO_MODEL,
    dtype: opt.Dtype = opt.DtypeChoice.AUTO,
    load_in: form.LoadIn = None,
    adapter: form.Adapter = None,
    assistant: form.Assistant = None,
    gpus: form.GpuCount = None,
    flags: dict[str, Any],
    local_files_only: form.LocalFilesOnly = False,
    trust_remote_code: form.TrustRemoteCode = False,
    tensor_parallel: Annotated[
        bool,
        opt.model_option(
            "--tensor-parallel",
            help_text="Be one of the ranks, one a GPU, that torchrun started to share the model.",
        ),
    ] = False,
    threads: opt.Threads = None,
    sampling: dict[str, Any],
    draft: form.Draft = None,
    stop: form.Stop = None,
    seed: form.Seed = None,
    trace: Annotated[
        str | None,
        typer.Option(
            "--trace",
            metavar="PATH",
            help="Write what the first decode steps did when, in Chrome's trace format.",
            rich_help_panel=opt.RESEARCH_PANEL,
        ),
    ] = None,
    save_session: sessions.SaveSession = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            metavar=opt.NO_VALUE,
            help="Print one JSON object with text, plan and statistics to stdout.",
            rich_help_panel=opt.OUTPUT_PANEL,
        ),
    ] = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Continue a prompt: text to stdout as it comes, all else to stderr.

    The KV cache lies in CPU memory and passes through GPU memory in tiles of
    heads x tokens. So the prompt may be far longer than GPU memory allows
    otherwise.

    [bold]headinfer generate --model ID --prompt-file book.txt --prompt "Who ...?"[/]
    """
    with reporting_errors(quiet=quiet or is_another()):
        if not tensor_parallel:
            ranks.check_alone("generate")
        check_writable("--trace", trace)
        number = None if draft is None else check_number(draft, "--draft")
        chosen = generation_options(sampling)
        options = opt.parse_flags(flags)
        set_aside = options.draft_tokens if opt.was_given(invocation, "draft_tokens") else None
        itself = drafts_itself(number, assistant, chosen.keywords(), set_aside, flag)
        if itself and set_aside is None:
            options = replace(options, draft_tokens="auto")
        split = tensor_parallel or (gpus or 1) > 1
        sessions.check_sessions(session, save_session, split=split)
        request = Request(
            generation=chosen,
            options=options,
            text=read_prompt(prompt, prompt_file or []),
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
            draft=number,
            assistant=assistant,
            seed=seed,
            trace=trace,
            session=session,
            save_session=save_session,
            threads=threads,
            as_json=as_json,
            quiet=quiet or is_another(),
            verbose=verbose,
            tensor_parallel=tensor_parallel,
        )
        _load_and_run(request)


def _begin_rank(request: Request) -> Launched:
    """Become one of the ranks that torchrun started, unless they could not do what is asked.

    Raises:
        HeadInferError: they could not.
    """
    refused = {
        "--load-in": request.source.load_in,
        "--adapter": request.source.adapter,
        "--assistant": request.assistant,
        "--trace": request.trace,
    }
    for option, value in refused.items():
        if value is not None:
            raise OptionError(f"{option} cannot be given with --tensor-parallel; leave one of them")
    return ranks.begin(request.options.device)


def _drafts(request: Request, model: Any) -> "Drafts":
    """Return what is asked of drafts, with the assistant loaded if there is one."""
    from headinfer.generation.assistants import load_assistant
    from headinfer.generation.drafts import Drafts

    source = None
    if request.assistant is not None:
        local = request.source.local_files_only
        source = NamedSource(name=request.assistant, local_files_only=local)
    return Drafts(number=request.draft, assistant=load_assistant(source, model))


def _load_and_run(request: Request) -> None:
    """Load in the order of cost: what can be refused early is."""
    console = stderr_console(quiet=request.quiet)
    share_cores()
    rank = _begin_rank(request) if request.tensor_parallel else None
    with Stages(console) as stages:
        begin_loading(stages, request.source)
        calm_transformers(verbose=request.verbose)
        prepare_cpu(request.threads)
        if request.source.gpus is not None:
            request.source.gpus.prepare()
        device = choose_device(request.options.device)
        if rank is not None:
            ranks.join(rank, device, request.threads)
        if request.source.gpus is not None:
            request.source.gpus.check(device)
        config = load_config(request.source)
        if rank is not None:
            from headinfer.generation.split import check_splittable

            check_splittable(request.source.name, config, rank.size)
        tokenizer = load_tokenizer(request.source)
        characters = plural(len(request.text), "character")
        stages.begin(f"tokenising {len(request.text):,} {characters}")
        positions = max_positions(config)
        ids = encode(
            tokenizer,
            request.text,
            system=request.system,
            template_values=request.template_values,
            raw=request.raw,
            check=lambda text: check_text_length(
                tokenizer, text, positions, allow_long=request.allow_long
            ),
        )
        begin_loading(stages, request.source)
        new_tokens = request.generation.max_new_tokens or DEFAULT_NEW_TOKENS
        note = check_length(len(ids), new_tokens, positions, allow_long=request.allow_long)
        model, unused = load_model(
            *(request.source, config),
            dtype=request.dtype,
            device=device,
            split=rank is not None,
        )
        drafts = _drafts(request, model)
        settings = settle(request.generation.keywords(), model.generation_config, len(ids))

        sessions.check_rows(settings.rows, request.session, request.save_session)

        from headinfer.api import attach
        from headinfer.integration.shards import ranks_of
    for told in filter(None, (note, unused, settings.note(flag))):
        console.print(f"note: {told}", markup=False)
    interrupt = Interrupt(console, None if rank is None else ranks_of(model))
    keywords = request.options.keywords() | {"device": device}
    tokens = len(ids) + settings.max_new_tokens
    with (
        interrupt.handling(),
        attach(model, **keywords) as offload,
        offload.session.assistants.during(
            drafts.assistant, drafts.assistant_tokens(model, settings, tokens)
        ),
    ):
        plan = offload.session.plan_for(settings.rows, tokens)
        print_plan(console, request.source.name, str(model.dtype).removeprefix("torch."), plan)
        for line in form.loaded_form(request.source, model, plan.shape.weights_bytes):
            console.print(f"  {escape(line)}", highlight=False)
        if rank is not None and request.seed is None:
            request = replace(request, seed=ranks.draw_seed(offload.session.ranks))
        cache, kept = sessions.open_cache(console, offload, request.session, ids, tokens)
        sessions.check_room(cache, plan, request.save_session, tokens)
        bar = PrefillBar(console, len(ids) - kept, interrupt.check)
        answer = Answer(request, settings, console, model, tokenizer, offload, plan, drafts)
        answer.generate(ids, cache, bar, interrupt)
        interrupt.finishing = True
        code = answer.finish()
    if code:
        raise typer.Exit(code)
