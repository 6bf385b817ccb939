"""A search for a pattern of heads, which can be stopped and gone on with.

What is done so far lies in a file beside the pattern to come, until that is there.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from headinfer.errors import OptionError
from headinfer.finding.copying import copying_scores
from headinfer.finding.gates import Gates
from headinfer.finding.repetition import repetition_scores
from headinfer.finding.shape import HeadShape, Rows
from headinfer.finding.texts import Texts
from headinfer.heads.pattern import HeadPattern
from headinfer.scratch import scratch_folder
from headinfer.units import counted

REPETITION, COPY, GATES = "repetition", "copy", "gates"


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpec:
    """A description of a search; equal ones have equal results.

    Attributes:
        method: `REPETITION`, `COPY` or `GATES`.
        model: its name.
        dtype: that the model computes in.
        texts: where they are from.
        tokens: the most tokens of a text.
        units: texts that are scored, or steps of a training.
        seed: of the texts.
        sink_tokens: first tokens that a streaming head is to see.
        recent_tokens: newest tokens that it is to see.
    """

    method: str
    model: str
    dtype: str
    texts: str
    tokens: int
    units: int
    seed: int
    sink_tokens: int
    recent_tokens: int

    @property
    def made(self) -> str:
        """How the pattern is made, for people."""
        ways = {
            REPETITION: "largest attention to {texts} from their repetition",
            COPY: "share of copied tokens that are looked at, in {texts}",
            GATES: "gates trained in {steps}",
        }
        way = ways[self.method].format(
            texts=counted(self.units, "text"), steps=counted(self.units, "step")
        )
        return (
            f"{way}, {counted(self.tokens, 'token')}, {self.texts}, {self.dtype}, seed {self.seed}"
        )


class Work(Protocol):
    """A search's work in units, each of which can be the last of a process."""

    def do(self, unit: int) -> None:
        """Do one unit."""

    def rows(self) -> Rows:
        """Return scores by layer and KV head."""

    def state(self) -> dict[str, Any]:
        """Return what is done so far, as JSON values."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""


def search(
    spec: SearchSpec,
    model: PreTrainedModel,
    texts: Texts,
    begun: Path,
    progress: Callable[[int, float | None], None] = lambda done, left_s: None,
) -> HeadPattern:
    """Return a pattern of a model's heads.

    Args:
        spec: of the search.
        model: a causal language model of transformers, not attached.
        texts: of the model's language.
        begun: file with what is done so far. It is gone on with if it is there, written after each
            unit, and left for whoever keeps the pattern to remove.
        progress: told the units that are done, and a guess of the seconds left.

    Raises:
        OptionError: the file is of another search, or the texts are too short.
        UnsupportedModelError: the model's attention cannot be looked into.
    """
    heads = HeadShape.of(model, spec.sink_tokens, spec.recent_tokens)
    work = _work(spec, model, texts, heads)
    done = _resume(spec, work, begun)
    started_s, first = time.monotonic(), done
    progress(done, None)
    for unit in range(done, spec.units):
        work.do(unit)
        _save(spec, work, unit + 1, begun)
        each_s = (time.monotonic() - started_s) / (unit + 1 - first)
        progress(unit + 1, each_s * (spec.units - unit - 1))
    return HeadPattern(
        scores=tuple(map(tuple, work.rows())),
        sink_tokens=spec.sink_tokens,
        recent_tokens=spec.recent_tokens,
        model=spec.model,
        made=spec.made,
    )


def _work(spec: SearchSpec, model: PreTrainedModel, texts: Texts, heads: HeadShape) -> Work:
    if spec.method == GATES:
        return _Training(spec, Gates(model, texts, heads, spec.units))
    scores = {REPETITION: repetition_scores, COPY: copying_scores}[spec.method]
    return _Scoring(
        lambda unit: scores(model, texts, spec.tokens, _seed(spec, unit), heads),
        heads.rows({}),
    )


def _seed(spec: SearchSpec, unit: int) -> str:
    return f"{spec.method}/{spec.seed}/{unit}"


class _Scoring:
    """A scoring of heads, text after text; scores are the mean over texts."""

    def __init__(self, score: Callable[[int], Rows], sums: Rows) -> None:
        self._score = score
        self._sums = sums
        self._done = 0

    def do(self, unit: int) -> None:
        self._sums = [
            [before + new for before, new in zip(*rows, strict=True)]
            for rows in zip(self._sums, self._score(unit), strict=True)
        ]
        self._done += 1

    def rows(self) -> Rows:
        return [[score / max(self._done, 1) for score in row] for row in self._sums]

    def state(self) -> dict[str, Any]:
        return {"sums": self._sums, "texts": self._done}

    def load(self, state: dict[str, Any]) -> None:
        self._sums, self._done = state["sums"], state["texts"]


class _Training:
    """A training of gates, step after step."""

    def __init__(self, spec: SearchSpec, gates: Gates) -> None:
        self._spec = spec
        self._gates = gates

    def do(self, unit: int) -> None:
        self._gates.step(unit, self._spec.tokens, _seed(self._spec, unit))

    def rows(self) -> Rows:
        return self._gates.rows()

    def state(self) -> dict[str, Any]:
        return self._gates.state()

    def load(self, state: dict[str, Any]) -> None:
        self._gates.load(state)


def _resume(spec: SearchSpec, work: Work, begun: Path) -> int:
    """Return how many units are done, having taken over what a file holds of them."""
    try:
        values = json.loads(begun.read_text(encoding="utf-8"))
        before = values["spec"]
        for name, value in asdict(spec).items():
            if before[name] != value:
                raise OptionError(
                    f"{str(begun)!r} holds work with other options: {name} {before[name]!r}, not "
                    f"{value!r}; delete it to begin anew"
                )
        work.load(values["state"])
        return int(values["done"])
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise OptionError(f"{str(begun)!r} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"{str(begun)!r} holds no work of such a search; delete it to begin anew"
        ) from error


def _save(spec: SearchSpec, work: Work, done: int, begun: Path) -> None:
    values = {"spec": asdict(spec), "done": done, "state": work.state()}
    try:
        with scratch_folder(begun.parent) as scratch:
            written = scratch / "work"
            written.write_text(json.dumps(values), encoding="utf-8")
            written.replace(begun)
    except OSError as error:
        raise OptionError(f"{str(begun)!r} cannot be written ({error.strerror})") from error
