"""What a log finds of accesses that are not ordered, beside one that forgets none."""

import random

import pytest
import torch

from headinfer.device.hazards import AccessLog, HazardError, join

STREAMS = ("compute", "copy-in", "copy-out")
NUM_BYTES = 12


def conflict(one: tuple[int, int, bool], other: tuple[int, int, bool]) -> bool:
    """Whether two ranges overlap, at least one of them written."""
    return one[0] < other[1] and other[0] < one[1] and (one[2] or other[2])


@pytest.mark.parametrize("chance_of_a_wait", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("seed", range(20))
def test_an_access_is_refused_where_an_earlier_one_is_not_ordered(seed, chance_of_a_wait) -> None:
    choose, log = random.Random(seed), AccessLog()
    memory = torch.zeros(NUM_BYTES, dtype=torch.uint8)
    clocks = {stream: {stream: 0} for stream in STREAMS}
    done = []
    for _ in range(60):
        stream = choose.choice(STREAMS)
        clock = clocks[stream]
        for other in STREAMS:
            if choose.random() < chance_of_a_wait:
                join(clock, clocks[other])
        clock[stream] += 1
        start = choose.randrange(NUM_BYTES)
        access = start, choose.randint(start + 1, NUM_BYTES), choose.random() < 0.4
        hazard = any(
            conflict(access, past) and clock.get(whose, 0) < count for whose, count, past in done
        )
        try:
            log.add(memory[start : access[1]], clock, stream, access[2], "test")
        except HazardError:
            assert hazard
            return  # what comes after a hazard is not asked for
        assert not hazard
        done.append((stream, clock[stream], access))
    ordered = all(clocks["compute"].get(whose, 0) >= count for whose, count, _ in done)
    storage = memory.untyped_storage().data_ptr()
    if ordered:
        log.release(storage, clocks["compute"], "what comes next")
    else:
        with pytest.raises(HazardError, match="what comes next is not ordered after the"):
            log.release(storage, clocks["compute"], "what comes next")
