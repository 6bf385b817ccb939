"""`headinfer evaluate agreement`: what a model predicts under each method, beside stock."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headinfer.bench.catalogue import parse_methods
from headinfer.bench.spec import check_lists
from headinfer.cli import form_options as form
from headinfer.cli.bench_options import named_model
from headinfer.cli.console import reporting_errors
from headinfer.cli.contexts import parse_contexts
from headinfer.cli.load import (
    NamedSource,
    beyond_positions,
    calm_transformers,
    check_trained,
    prepare_cpu,
    share_cores,
)
from headinfer.cli.options import (
    NO_VALUE,
    Dtype,
    DtypeChoice,
    Methods,
    Threads,
    TrainedModel,
    with_flags,
)
from headinfer.cli.output import (
    JsonPath,
    Resume,
    check_results,
)
from headinfer.cli.prompt import encode, read_text
from headinfer.cli.results import collect, exit_code, tell
from headinfer.cli.run_progress import run_console, showing_progress
from headinfer.cli.streaming import check_streaming_heads
from headinfer.gguf_models import unpacked_dtype
from headinfer.plan.options import Options
from headinfer.plan.streaming import STREAMING_OPTIONS

if TYPE_CHECKING:
    from headinfer.evaluate.agreement.document import AgreementResults
    from headinfer.evaluate.agreement.run import Agreement


@with_flags(
    "device",
    "device_memory",
    "chunk_tokens",
    "tile_heads",
    "tile_tokens",
    "resident_tokens",
    "host_attention",
    *STREAMING_OPTIONS,
    device_memory="GPU memory that HeadInfer's methods may use, such as 24GiB; auto: what is free.",
)
def agreement(
    *,
    model: TrainedModel,
    file: Annotated[
        str, typer.Option("--file", "-f", metavar="TEXT", help="A UTF-8 text file, -: stdin.")
    ],
    contexts: Annotated[
        str | None,
        typer.Option(
            "--contexts",
            "--context",
            metavar="COUNTS",
            help="Tokens from the beginning of the text: 1K,4K.",
            show_default="the whole text",
        ),
    ] = None,
    methods: Methods = "standard, chunked-prefill, kv-4bit, bounded, headinfer",
    no_float32: Annotated[
        bool,
        typer.Option(
            "--no-float32",
            metavar=NO_VALUE,
            help="In 16 bits, leave out the float32 reference, which takes twice the weights' "
            "memory more.",
        ),
    ] = False,
    dtype: Dtype = DtypeChoice.AUTO,
    load_in: form.LoadIn = None,
    adapter: form.Adapter = None,
    flags: dict[str, Any],
    threads: Threads = None,
    json_path: JsonPath = None,
    resume: Resume = False,
) -> None:
    """Tell how far each method's predictions are from stock's, position by position.

    Stock transformers reads the text beside each method. Compared are the
    likeliest token of every position, and the KL divergence of the logits.

    Exit code 1 when an exact method does not agree, or nothing could be
    compared. In 16 bits it must be as near to float32 as stock is.
    """
    with reporting_errors():
        names = parse_methods(methods, evaluated=True)
        counts = None if contexts is None else sorted(parse_contexts(contexts, "1K,4K"))
        check_lists(names, counts or (1,))
        options = Options.parse(**flags)
        check_results(json_path, resume=resume)
        check_trained(model)
        text = read_text(file, "file", "a file with --file")
        share_cores()
        calm_transformers(verbose=False)
        prepare_cpu(threads)
        with showing_progress(console := run_console()) as progress:
            progress.started(f"loading {model}", None)
            run, results, told = _prepare(
                NamedSource(
                    name=model,
                    load_in=load_in and load_in.value,
                    adapter=adapter,
                    unpacked_dtype=unpacked_dtype(dtype.value),
                ),
                (file, text),
                (names, counts),
                options=options,
                dtype=dtype.value,
                float32=not no_float32 and load_in is None,  # quantised weights have no float32
                progress=progress,
                begun=json_path if resume else None,
            )
            for note in told:
                console.print(f"note: {note}", markup=False, soft_wrap=True)
            stopped = collect(run.rows(), results.rows.append, results, json_path)
        if stopped is not None and not results.rows:
            raise stopped

        from headinfer.evaluate.agreement.table import render

        tell(results, lambda: render(results), json_path, console, stopped=stopped is not None)
        if stopped is not None:
            raise stopped
        raise typer.Exit(exit_code(row.status for row in results.rows))


def _prepare(
    source: NamedSource,
    named_text: tuple[str, str],
    asked: tuple[tuple[str, ...], list[int] | None],
    *,
    options: Options,
    dtype: str,
    float32: bool,
    progress: Any,
    begun: str | None,
) -> tuple["Agreement", "AgreementResults", list[str]]:
    """Load in the order of cost, so that what can be refused early is.

    Returns:
        The run, its results so far, and notes for the user.
    """
    import torch

    from headinfer.bench.quantised import check_backends
    from headinfer.evaluate.agreement.document import AgreementResults, header
    from headinfer.evaluate.agreement.run import Agreement
    from headinfer.evaluate.agreement.spec import AgreementSpec
    from headinfer.generation.model import choose_device, load_config, load_model, load_tokenizer

    name, text = named_text
    names, counts = asked
    device = choose_device(options.device)
    check_backends(names)
    config = load_config(source)
    ids = encode(load_tokenizer(source), text, raw=True)
    if not counts:
        counts = [len(ids)]
    shape = named_model(source.name, dtype, load_in=source.load_in)
    check_streaming_heads(names, options, shape.planned)

    def spec_in(kind: str) -> AgreementSpec:
        return AgreementSpec(
            methods=names,
            contexts=tuple(counts),
            dtype=kind,
            model=shape,
            settings=options,
            float32=float32,
            adapter=source.adapter,
        )

    spec_in(dtype).check_text(len(ids))
    model, note = load_model(source, config, dtype=dtype, device=device)
    spec = spec_in(str(model.dtype).removeprefix("torch."))
    results = AgreementResults(spec=spec, header=header(spec, model, name, text, len(ids)))
    if begun is not None and Path(begun).exists():
        results = AgreementResults.load(begun).continued(results)
    tokens = torch.tensor([ids], device=model.device)
    run = Agreement(results.spec, model, tokens, progress, done=results.done)
    return run, results, [said for said in (note, beyond_positions(config, max(counts))) if said]
