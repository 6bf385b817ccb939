"""A pipeline: chunks of a prompt that follow each other through GPUs which have layers each."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline's times.

    Attributes:
        seconds: from the first chunk's begin to the last one's end.
        busy: share of that in which each GPU works.
    """

    seconds: float
    busy: tuple[float, ...]


def pipeline(chunks_s: Sequence[Sequence[float]], *, follow: bool = True) -> Pipeline:
    """Return the times of chunks that pass through GPUs, one after the other.

    A GPU begins with a chunk once it is done with the one before, and the GPU before with this one.

    Args:
        chunks_s: for each chunk, the seconds that it takes on each GPU.
        follow: whether a chunk begins before the one in front has left the last GPU.
    """
    gpus = len(chunks_s[0])
    free_s = [0.0] * gpus
    for times in chunks_s:
        done_s = 0.0 if follow else max(free_s)
        for gpu, seconds in enumerate(times):
            done_s = free_s[gpu] = max(done_s, free_s[gpu]) + seconds
    total_s = max(free_s)
    work_s = [sum(times[gpu] for times in chunks_s) for gpu in range(gpus)]
    return Pipeline(total_s, tuple(seconds / total_s if total_s else 1.0 for seconds in work_s))
