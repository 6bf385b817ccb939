"""A layer's first tokens attended to themselves by one operator, whose output is the result."""

import pytest
import torch

from headinfer.attend.cpu import CpuKernel
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.table import Kernels
from headinfer.attend.work import Work, by_kv_head, tile_in_hand
from headinfer.kv.pair import KV

DIM = 16


def drawn(batch: int, kv_heads: int, group: int, tokens: int, dtype: torch.dtype) -> KV:
    """Return queries as a model makes them, and new tokens: heads and tokens lie transposed."""
    shapes = (batch, tokens, kv_heads * group, DIM), (batch, tokens, 2 * kv_heads, DIM)
    query, both = (torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes)
    return KV(query, both)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_result_has_the_bits_of_a_partial_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernels = Kernels([CpuKernel()])
    for shape in ((1, 2, 3, 70), (2, 1, 4, 33), (1, 2, 3, 70), (1, 2, 3, 71)):
        query, both = drawn(*shape, dtype)
        new = KV(*both.chunk(2, dim=1))
        grouped = by_kv_head(query, new)
        total = kernels.begin(grouped, scale=0.3)
        work = Work(grouped, (tile_in_hand(new),), 0.3, total, causal=True)
        kernels.pick(work).attend(work)
        wanted = query.new_empty((shape[0], shape[3], *shape[1:3], DIM))
        total.write(wanted)
        found = kernels.attend_square(query, new, 0.3)
        assert found is not None
        assert found.is_contiguous()
        assert torch.equal(found, wanted.flatten(2, 3))


def test_what_is_converted_or_has_no_such_operator_is_left_to_partials() -> None:
    cpu = Kernels([CpuKernel()])
    for kernels, dtype in ((cpu, torch.float16), (Kernels([ReferenceKernel()]), torch.float32)):
        query, both = drawn(1, 2, 2, 40, torch.float32)
        assert cpu.attend_square(query, KV(*both.chunk(2, dim=1)), 0.3) is not None
        query, both = query.to(dtype), both.to(dtype)
        assert kernels.attend_square(query, KV(*both.chunk(2, dim=1)), 0.3) is None
