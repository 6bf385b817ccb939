"""Kernels that prepare for each new shape are asked in few shapes, which come again."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attended import attended, reference
from headinfer.attend.cuda import CudaKernel
from headinfer.attend.fused_call import FusedCall
from headinfer.attend.partial import Accumulator
from headinfer.attend.recurring import cut_in_powers
from headinfer.attend.table import Kernels
from headinfer.attend.work import Work, tile_in_hand
from headinfer.kv.extent import Piece, Tile
from headinfer.kv.pair import KV

HEADS, GROUP, DIM, SCALE, CHUNK = 7, 2, 8, 0.3, 64
CAPACITY = 16 * CHUNK
"""Tokens that a layer has memory for."""


@pytest.fixture
def shapes() -> set[tuple[Any, ...]]:
    """What the kernel prepared for."""
    return set()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, shapes: set[tuple[Any, ...]]) -> Kernels:
    """With the reference in place of a GPU's operators."""

    def operator(name: str, *, causal: bool = False, prepares: bool = True) -> FusedCall:
        def call(query, keys, values, /, *, scale):
            if prepares:
                layout = [(each.shape, each.stride()) for each in (query, keys, values)]
                shapes.add((name, *layout))
            at = query.unsqueeze(2)
            partial = attended(reference(), at, keys, values, scale=scale, causal=causal)
            return partial.out[:, :, 0], partial.lse[:, :, 0]

        return call

    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    small = operator("small", prepares=False)
    square = operator("square", causal=True)
    device = torch.device("cpu")
    prepared = CudaKernel(
        *("prepared", device),
        tile=operator("tile"),
        square=square,
        small=small,
        least_pairs=16 * GROUP * CHUNK,
    )
    plain = operator("square", causal=True, prepares=False)
    return Kernels([prepared, CudaKernel("other", device, tile=small, square=plain)])


def attend_in_chunks(kernels: Kernels, heads: list[int], chunks: int, *, staged: int) -> None:
    """Attend a prompt in chunks by some heads of a layer, and compare with torch's attention.

    Args:
        kernels: attend.
        heads: which.
        chunks: their number.
        staged: of the past tokens, how many are a tile of their own behind the residents.
    """
    generator = torch.Generator().manual_seed(len(heads))
    shape = 1, HEADS, GROUP, CAPACITY, DIM
    query = torch.randn(shape, generator=generator, dtype=torch.float64)[:, heads]
    keys, values = torch.randn((2, 1, HEADS, CAPACITY, DIM), generator=generator).double()
    held = KV(keys[:, heads], values[:, heads])  # memory of these heads alone, as a track has it
    for first in range(0, CHUNK * chunks, CHUNK):
        chunk = slice(first, first + CHUNK)
        total, ours = Accumulator(), query[:, :, :, chunk]
        own = tile_in_hand(KV(*(part.contiguous() for part in held.cut(chunk))))
        behind = min(staged, first)
        near = Tile(0, first - behind, Piece(torch.empty(0, dtype=torch.uint8)), held)
        past = [near, near._replace(first=first - behind, tokens=behind)]
        for work in (
            Work(ours, [own], SCALE, total, causal=True),
            *(Work(ours, [tile], SCALE, total) for tile in past if tile.tokens),
        ):
            kernels.pick(work).attend(work)
        seen = held.cut(slice(first + CHUNK))
        mask = torch.ones(CHUNK, first + CHUNK, dtype=torch.bool).tril(first)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            ours, seen.keys.unsqueeze(2), seen.values.unsqueeze(2), attn_mask=mask, scale=SCALE
        )
        torch.testing.assert_close(total.result().out, wanted)


def test_a_prompt_has_few_shapes_to_prepare(kernels, shapes) -> None:
    """However long it is, and whatever the numbers of full heads of its layers."""
    attend_in_chunks(kernels, [0, 3], 3, staged=0)
    shapes.clear()  # those of the check that comes first, too
    for heads in ([0, 3], [5], [1, 2, 6], [0, 1, 2, 4, 5, 6]):
        attend_in_chunks(kernels, heads, 12, staged=83)
    # By two heads and by one: a square, and 2, 4, ... 512 tokens. A square of a layer with one head
    # besides, since torch leaves the stride of a single head as it is.
    assert len(shapes) == 2 * (1 + 9) + 1


def test_a_longer_prompt_has_a_shape_more_for_twice_the_tokens(kernels, shapes) -> None:
    attend_in_chunks(kernels, [0, 1, 2, 3], 8, staged=0)
    few = len(shapes)
    attend_in_chunks(kernels, [0, 1, 2, 3], 16, staged=0)
    assert len(shapes) == few + 1


@pytest.mark.parametrize(
    ("tokens", "least", "stretches"),
    [
        (0, 4, []),
        (3, 4, [3]),
        (4, 4, [4]),
        (103, 4, [64, 32, 4, 3]),
        (103, 40, [64, 39]),
        (7, 1, [4, 2, 1]),
    ],
)
def test_tokens_are_cut_in_powers_of_two(tokens: int, least: int, stretches: list[int]) -> None:
    cuts = list(cut_in_powers(tokens, least))
    assert [cut.stop - cut.start for cut in cuts] == stretches
    assert [cut.start for cut in cuts] == [sum(stretches[:at]) for at in range(len(stretches))]
