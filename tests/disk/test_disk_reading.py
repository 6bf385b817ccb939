"""What is read of a region for some tokens, and where these lie then."""

import itertools
import random

import pytest
import torch

from headinfer.disk.file import SpillFile, aligned_empty
from headinfer.disk.reading import placed, read_bytes, strips

ALIGNMENT = SpillFile.ALIGNMENT


@pytest.mark.parametrize("seed", range(60))
def test_tokens_come_back_wherever_heads_begin(seed: int) -> None:
    draw = random.Random(seed)
    batch, heads, rows = draw.choice([1, 1, 2]), draw.choice([1, 2, 4]), draw.choice([1, 3, 64])
    dtype, dim = draw.choice([(torch.uint8, 1600), (torch.uint8, 1152), (torch.bfloat16, 128)])
    before = draw.choice([0, 1600 * 7, 4096])
    size = batch * heads * rows * dim * dtype.itemsize
    whole = -(-(before + size) // ALIGNMENT) * ALIGNMENT
    file = torch.randint(
        256, (whole,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )

    def part_of(memory: torch.Tensor) -> torch.Tensor:
        values = memory[before : before + size].view(dtype).view(batch, heads, rows, dim)
        return values[:, first:end, low:high]

    first = draw.randrange(heads)
    end = draw.randrange(first, heads) + 1
    low = draw.randrange(rows)
    high = draw.randrange(low, rows) + 1
    part = part_of(torch.empty(whole, dtype=torch.uint8, device="meta"))
    place = 2 * ALIGNMENT
    memory, written = aligned_empty(place + read_bytes(part)), []
    for strip in strips(part, place):
        for number in strip:
            assert number % ALIGNMENT == 0
        memory[strip.place : strip.place + strip.num_bytes] = file[strip.offset :][
            : strip.num_bytes
        ]
        written.append((strip.place, strip.place + strip.num_bytes))
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(written))
    assert torch.equal(
        placed(part, memory, place).view(torch.uint8), part_of(file).view(torch.uint8)
    )
