"""Steps of a few new tokens that are ready to be captured or replayed, and in which form."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from headinfer.engine.streaming_step import StreamedTrack
from headinfer.kv.extent import Extent
from headinfer.kv.ledger import Ledger
from headinfer.schedule.steps import SendHome


class Form(enum.Enum):
    """A form of a captured step."""

    ONE_LAUNCH = "attention is captured with all else, at places read from memory"
    STREAMED = "that, with the copies of tiles and the host's attention"
    IN_PIECES = "attention is enqueued anew in each replay, between the pieces of a capture"


@dataclass(frozen=True, slots=True)
class Ready:
    """A track that is ready for new tokens.

    Attributes:
        ledger: of the track.
        extent: has room for them, and all that they see unless tokens are streamed.
        after: what sends tokens home once they are there.
        home: whether the extent is the host's, where the device attends that in place.
        streamed: what the step does where that is no single launch; None where it is.
    """

    ledger: Ledger
    extent: Extent
    after: tuple[SendHome, ...] = ()
    streamed: StreamedTrack | None = None
    home: bool = False

    def count(self, new_tokens: int) -> None:
        """Count the new tokens, which are there."""
        if self.home:
            self.ledger.extend_host(new_tokens)
        else:
            self.ledger.extend(self.extent, new_tokens)

    @property
    def reads(self) -> tuple[object, ...]:
        """What a capture reads, numbers that are in it included."""
        return (self.extent.piece,) if self.streamed is None else self.streamed.reads

    @property
    def place(self) -> tuple[int, ...]:
        """What is written to memory; see `TokenWork.place` and `StreamedTrack.place`."""
        if self.streamed is not None:
            return self.streamed.place
        tile = self.ledger.next_tile(self.extent)
        return tile.first, tile.tokens, self.ledger.sink_tokens


class StepMemory:
    """A piece of memory on the device from which captured steps read what changes.

    Args:
        tracks: of a step.
        heads: rows of the batch x KV heads of a track, at most.
        new_tokens: of each row.
        where: the device.

    Attributes:
        places: `[tracks, 2 + new_tokens]` of int64; see `Ready.place`.
        counters: zeros `[heads]` of int32; see `TokenWork`.
    """

    def __init__(self, tracks: int, heads: int, new_tokens: int, where: torch.device) -> None:
        with torch.inference_mode(False):  # or they could not be written to outside it
            self.places = torch.zeros(tracks, 2 + new_tokens, dtype=torch.int64, device=where)
            self.counters = torch.zeros(heads, dtype=torch.int32, device=where)

    def write(self, ready: Sequence[Ready]) -> None:
        """Write where each track's new tokens go, on compute, for a replay to read."""
        places = torch.tensor([each.place for each in ready], device="cpu")
        self.places.copy_(places, non_blocking=True)


class ReadyStep(NamedTuple):
    """A step that could be captured, or replayed.

    Attributes:
        form: in which.
        reads: what the capture reads; one that read the same serves the step.
    """

    form: Form
    reads: tuple[object, ...] = ()


IN_PIECES = ReadyStep(Form.IN_PIECES)
"""A step in pieces, which reads what it finds."""
