"""Whether a table of kernels works here: its results on small inputs against the reference's."""

import logging
from collections.abc import Iterator

import torch

from headinfer.attend.partial import Accumulator
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.table import Kernels
from headinfer.attend.work import TokenWork, Work, tile_in_hand
from headinfer.kv.pair import KV

_logger = logging.getLogger(__name__)

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 5e-3,  # loose enough for tf32; a wrong kernel is off by far more
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}

_CHECKED = (
    *((1, 1031, False), (1, 1031, False), (21, 70, False)),
    *((33, 70, False), (33, 1, False), (90, 70, False), (33, 33, True)),
)
"""Query tokens, keys, and whether causal, of what a table is checked with, for 3 query heads.

The tiles for decoding come twice, since a program's first launch is not like the others. They also
come with the most rows. Tiles and a causal square stand for prefill, here and on the CPU.
"""

_MERGED = (33, 40, 70)
"""New tokens of a chunk, and the keys of the tiles it is attended to besides itself."""

_DECODED = (1, 1031, 1031)
"""Keys, the new token's among them, of the decode calls a table is checked with."""

Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]


def agrees(
    kernels: Kernels,
    torch_device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    softcap: float | None = None,
) -> bool:
    """Run a table and the reference on small inputs; one that fails does not agree."""
    reference, generator = Kernels([ReferenceKernel(softcap)]), torch.Generator().manual_seed(0)
    scale = head_dim**-0.5 * (softcap or 1.0)  # so that a bound is felt

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(torch_device, dtype)

    def doubled(*tensors: torch.Tensor) -> KV:
        return KV(*(part.to(torch.float64, copy=True) for part in tensors))  # copies float64, too

    def attended(q_len: int, kv_len: int, causal: bool) -> Pairs:
        query = draw(1, 2, 3, q_len, head_dim)
        kv, results = KV(draw(1, 2, kv_len, head_dim), draw(1, 2, kv_len, head_dim)), []
        for table, at, tokens in ((kernels, query, kv), (reference, query.double(), doubled(*kv))):
            total = Accumulator()
            work = Work(at, [tile_in_hand(tokens)], scale, total, causal=causal)
            table.pick(work).attend(work)
            results.append(total.result())
        yield results[0].out, results[1].out
        yield results[0].lse, results[1].lse

    def merged(q_len: int, *tiles: int) -> Pairs:
        query, own = draw(1, 2, 3, q_len, head_dim), draw(1, 2, q_len, head_dim)
        past = [draw(1, 2, kv_len, head_dim) for kv_len in tiles]
        results = []
        for table, to in ((kernels, dtype), (reference, torch.float64)):
            out = query.new_empty(1, q_len, 2, 3, head_dim, dtype=to)
            at = query.to(to)
            total = table.begin(at, scale=scale)
            for keys in (own, *past):
                tile = tile_in_hand(KV(keys.to(to), keys.to(to)))
                work = Work(at, [tile], scale, total, causal=keys is own)
                table.pick(work).attend(work)
            total.write(out)
            results.append(out)
        yield results[0], results[1]

    def decoded(kv_len: int) -> Pairs:
        query = draw(1, 2, 3, 1, head_dim)
        new, past = (KV(draw(1, 2, n, head_dim), draw(1, 2, n, head_dim)) for n in (1, kv_len))
        out = query.new_empty(1, 1, 2, 3, head_dim)
        wanted, wanted_past = torch.empty_like(out, dtype=torch.float64), doubled(*past)
        tile = tile_in_hand(past)
        kernels.decode(TokenWork(query, new, tile, scale, out))
        tile = tile_in_hand(wanted_past)
        reference.decode(TokenWork(query.double(), doubled(*new), tile, scale, wanted))
        yield out, wanted
        yield from zip(past, wanted_past, strict=True)

    try:
        pairs = [pair for kind in _CHECKED for pair in attended(*kind)]
        pairs += merged(*_MERGED)
        pairs += [pair for kv_len in _DECODED for pair in decoded(kv_len)]
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels, and this choice would last
    except Exception as error:  # a compiler's own kinds among them: another table serves
        _logger.info("%s: %s", kernels.name, error)
        return False
    for got, want in pairs:
        error_max = (got.double() - want.double()).abs().max().item()
        if not error_max <= TOLERANCE[dtype]:
            _logger.info("%s is off by %g", kernels.name, error_max)
            return False
    return True
