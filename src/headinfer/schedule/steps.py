"""The steps of a pass, as values: they name tokens and places, and hold no tensors.

A place is attended as a whole, however many tokens it holds when the step runs. So the same steps
serve one decode step after another, until a token's place changes.
"""

import enum
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from headinfer.units import counted, plural


class Where(enum.Enum):
    """A place that tokens are written to, and attended in."""

    RESIDENT = "the residents"
    PAGE = "the page"
    CHUNK_PAGE = "a chunk page"
    HOST = "host memory"
    WINDOW = "the window"
    SINKS = "the sinks"
    DRAFT = "the copies for drafts"


@dataclass(frozen=True, slots=True)
class SendHome:
    """A step that copies to the host the tokens that it lacks.

    Attributes:
        start: the first of them.
        end: one past the last.
        turn: whether new tokens follow at once, in the other page. The next pass's find the same
            page empty.
        late: whether residents are sent, which nothing waits for: those of all layers go at once,
            behind the last layer.
    """

    start: int
    end: int
    turn: bool = False
    late: bool = False

    def __str__(self) -> str:
        """Say it in a line."""
        when = " behind the last layer" if self.late else ""
        return f"send tokens {self.start} to {self.end} home{when}"


@dataclass(frozen=True, slots=True)
class Keep:
    """A step that writes the new tokens behind those of a place."""

    where: Where

    def __str__(self) -> str:
        """Say it in a line."""
        return f"keep the new tokens in {self.where.value}"


@dataclass(frozen=True, slots=True)
class Ask:
    """A step that has the host begin to attend some of its tokens.

    Attributes:
        start: the first of them.
        end: one past the last.
    """

    start: int
    end: int

    def __str__(self) -> str:
        """Say it in a line."""
        return f"ask the host about tokens {self.start} to {self.end}"


@dataclass(frozen=True, slots=True)
class Fetch:
    """A step that begins to copy tokens of the host to the device, tile by tile.

    The tiles of one group of KV heads come before those of the next.

    Attributes:
        start: the first of the tokens.
        end: one past the last.
        tile_tokens: the most tokens of a tile.
        heads: KV heads of a tile; those of the last group may be fewer.
        groups: number of groups.
    """

    start: int
    end: int
    tile_tokens: int
    heads: int
    groups: int

    @property
    def tiles(self) -> int:
        """Number of tiles, if the host's tokens are in one piece."""
        return self.groups * math.ceil((self.end - self.start) / self.tile_tokens)

    def __str__(self) -> str:
        """Say it in a line."""
        tokens = f"{self.tile_tokens} {plural(self.tile_tokens, 'token')}"
        tiles, each = f"{self.tiles} {plural(self.tiles, 'tile')}", counted(self.heads, "head")
        return f"fetch tokens {self.start} to {self.end} in {tiles} of {each} x {tokens}"


@dataclass(frozen=True, slots=True)
class Decode:
    """A step that attends and keeps a single new token at once, where one place has all it sees."""

    where: Where

    def __str__(self) -> str:
        """Say it in a line."""
        return f"attend {self.where.value} and the new token, and keep it there"


@dataclass(frozen=True, slots=True)
class Own:
    """A part of attention: the new tokens among themselves, causally."""

    def __str__(self) -> str:
        """Say it in a line."""
        return "the new tokens"


@dataclass(frozen=True, slots=True)
class Near:
    """A part of attention: all tokens of a place on the device."""

    where: Where

    def __str__(self) -> str:
        """Say it in a line."""
        return self.where.value


@dataclass(frozen=True, slots=True)
class Band:
    """A part of attention: a window, the new tokens within it; each sees its own stretch of it."""

    def __str__(self) -> str:
        """Say it in a line."""
        return "the window"


@dataclass(frozen=True, slots=True)
class Tiles:
    """A part of attention: tokens of the host, tile by tile, as they come or where they lie."""

    def __str__(self) -> str:
        """Say it in a line."""
        return "the tiles"


Part: TypeAlias = Own | Near | Band | Tiles


@dataclass(frozen=True, slots=True)
class Attend:
    """A step that attends the new tokens to some parts, one group of KV heads after another.

    Attributes:
        heads: KV heads of a group; the last one may be smaller.
        groups: number of groups.
        parts: what is attended, in order.
        write: whether the result is written at once; else the host's answer is still to come.
    """

    heads: int
    groups: int
    parts: tuple[Part, ...]
    write: bool = True

    def __str__(self) -> str:
        """Say it in a line."""
        each = counted(self.heads, "head")
        if self.groups > 1:
            each = f"{self.groups} x {each}"
        return f"attend by {each}: {', '.join(map(str, self.parts))}"


@dataclass(frozen=True, slots=True)
class Answer:
    """A step that merges the host's partial result into each group's, and writes the result."""

    def __str__(self) -> str:
        """Say it in a line."""
        return "merge the host's answer"


Step: TypeAlias = SendHome | Keep | Ask | Fetch | Decode | Attend | Answer


@dataclass(frozen=True, slots=True)
class TrackSteps:
    """A track's steps in one pass.

    Attributes:
        steps: in order.
        from_tokens: tokens of the track from which these steps serve, if the host gets none.
        until_tokens: tokens before which they do; infinite where that is for ever.
    """

    steps: tuple[Step, ...]
    from_tokens: int = 0
    until_tokens: float = math.inf

    def serves(self, tokens: int) -> bool:
        """Whether the steps serve a track of so many tokens.

        They do only as long as no others were performed for the track, and none sent tokens home.
        """
        return self.from_tokens <= tokens < self.until_tokens


@dataclass(frozen=True, slots=True)
class Run:
    """A run of layers that do the same in a pass.

    Attributes:
        layers: which, in order, counted among those that attend.
        track: what each of them does.
    """

    layers: tuple[int, ...]
    track: TrackSteps

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps of each layer."""
        return self.track.steps


@dataclass(frozen=True, slots=True)
class Schedule:
    """A pass over all layers, written in runs of layers that are alike.

    Its size does not grow with the number of tokens, nor with that of layers which are alike.

    Attributes:
        runs: each layer is in one of them.
    """

    runs: tuple[Run, ...]

    def lines(self) -> Iterator[str]:
        """Yield the schedule in lines for people."""
        for run in self.runs:
            yield f"{_layers(run.layers)}:"
            for step in run.steps:
                yield f"  {step}"

    def __str__(self) -> str:
        """Return `lines`, one below the other."""
        return "\n".join(self.lines())


def _layers(layers: tuple[int, ...]) -> str:
    """Name some layers, neighbours as a range."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and ranges[-1][1] == layer - 1:
            ranges[-1][1] = layer
        else:
            ranges.append([layer, layer])
    names = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(names)}"
