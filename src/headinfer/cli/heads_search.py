"""The search of `headinfer heads`: what it needs, loaded, and its progress."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from headinfer.cli.load import NamedSource, max_positions
from headinfer.cli.run_progress import RunProgress
from headinfer.errors import OptionError
from headinfer.heads.pattern import HeadPattern
from headinfer.units import counted, format_tokens

if TYPE_CHECKING:
    from headinfer.finding.search import SearchSpec
    from headinfer.finding.texts import Texts

_TEXT_TOKENS, _EXAMPLE_TOKENS = 2048, 1024
"""Tokens of a text that is scored, and of one that gates are trained on."""


def prepare(
    named: tuple[str, str, str],
    asked: tuple[str, int | None, int],
    numbers: tuple[int, int, int],
    prose_from: tuple[str | None, bool],
    console: Console,
) -> tuple["SearchSpec", Any, "Texts"]:
    """Load what a search needs in the order of cost, so that what can be refused early is.

    Args:
        named: the model, its dtype and its device, as the user gave them.
        asked: the way of scoring, the tokens of a text if any are asked for, and the units of work.
        numbers: seed, sink tokens and recent tokens.
        prose_from: path of the prose, or None, and whether the chat template is left out.
        console: for notes.

    Raises:
        HeadInferError: the model or the prose cannot be had, or the tokens do not fit.
    """
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
            f"a text of {counted(tokens, 'token')} has none beyond {counted(sink_tokens, 'sink')} "
            f"and {counted(recent_tokens, 'recent token')}; give more --tokens, or a smaller "
            "--recent-tokens"
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


def run_search(
    spec: "SearchSpec",
    model: Any,
    texts: "Texts",
    begun: Path,
    progress: RunProgress,
    console: Console,
) -> HeadPattern:
    """Return the pattern that is found, and say how far the search is.

    Args:
        spec: of the search.
        model: as `prepare` loaded it.
        texts: of the model's language.
        begun: file for what is done so far.
        progress: of the verb.
        console: on stderr.
    """
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
