"""What would do where the memory of several GPUs does not: more of them, or more of each."""

from collections.abc import Callable, Iterator, Sequence

from headinfer.estimate.choose import Change, ceiling
from headinfer.estimate.gpus import layers_plan
from headinfer.estimate.situation import Situation
from headinfer.estimate.split_plan import SplitPlan
from headinfer.units import format_bytes


def split_changes(
    situation: Situation, memory_bytes: Sequence[int], *, quantising: bool
) -> Iterator[Change]:
    """Yield the fewest GPUs that would do, and the least memory of each, both found by trying.

    More of either helps layers alone: heads need GPUs that share them evenly.

    Args:
        situation: of one GPU.
        memory_bytes: the most to use of each GPU; more of them are taken to give what the last one
            does.
        quantising: whether weights are quantised as they are loaded.
    """

    def by_layers(memory_bytes: Sequence[int]) -> SplitPlan:
        return layers_plan(situation, memory_bytes, quantising=quantising)

    if not memory_bytes:
        return
    short_bytes = by_layers(memory_bytes).fullest.short_bytes
    if not short_bytes:
        return  # CPU memory or the disk is lacking, which no GPU adds to
    given, last = list(memory_bytes), memory_bytes[-1]

    def fits(gpus: int) -> bool:
        return by_layers(given + [last] * (gpus - len(given))).fits

    gpus = _least_gpus(fits, len(given), len(situation.shape.layers))
    if gpus is not None:
        as_last = "" if len(set(given)) == 1 else f", if the others give {format_bytes(last)}"
        yield Change(gpus=gpus, line=f"--gpus {gpus}{as_last}")
    if len(set(given)) == 1 and by_layers([last + short_bytes] * len(given)).fits:
        size = last + short_bytes
        more = f"{format_bytes(short_bytes)} more of each GPU"
        yield Change(device_memory_bytes=size, line=f"--device-memory {ceiling(size)}, {more}")


def _least_gpus(fits: Callable[[int], bool], too_few: int, most: int) -> int | None:
    """Return the fewest GPUs that fit, of those above a number; None where not even the most do."""
    enough = too_few
    while not fits(enough := min(2 * enough, most)):
        if enough == most:
            return None
        too_few = enough
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if fits(middle) else (middle, enough)
    return enough
