"""Whether a kernel works here: its results on small inputs against the reference's."""

import logging
from collections.abc import Iterator

import torch

from headinfer.attend.partial import Kernel
from headinfer.attend.reference import ReferenceKernel

_logger = logging.getLogger(__name__)

TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 5e-3,  # loose enough for tf32; a wrong kernel is off by far more
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


_CHECKED = (
    *((1, 1031, False), (1, 1031, False), (21, 70, False)),
    *((33, 70, False), (33, 1, False), (33, 33, True)),
)
"""Query tokens, keys, and whether causal, of what a kernel is checked with, for 3 query heads.

Tiles for decoding, twice since a program's first launch is not like the others, and once with the
most rows; tiles and a causal square for prefill.
"""

_MERGED = (33, 40, 70)
"""New tokens of a chunk, and the keys of the tiles it is attended to besides itself."""

_DECODED = (1, 1031, 1031)
"""Keys, the new token's among them, of the decode calls a kernel is checked with."""


def agrees(kernel: Kernel, torch_device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Run a kernel and the reference on small inputs; one that fails does not agree."""
    reference, generator = ReferenceKernel(), torch.Generator().manual_seed(0)
    scale = head_dim**-0.5

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(torch_device, dtype)

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.float64, copy=True)  # also where it is float64 already

    def attended(q_len: int, kv_len: int, causal: bool) -> Iterator[tuple[torch.Tensor, ...]]:
        query = draw(1, 2, 3, q_len, head_dim)
        keys, values = draw(1, 2, kv_len, head_dim), draw(1, 2, kv_len, head_dim)
        ours = kernel.attend(query, keys, values, scale=scale, causal=causal)
        wanted = reference.attend(
            query.double(), keys.double(), values.double(), scale=scale, causal=causal
        )
        yield ours.out, wanted.out
        yield ours.lse, wanted.lse

    def merged(q_len: int, *tiles: int) -> Iterator[tuple[torch.Tensor, ...]]:
        query, own = draw(1, 2, 3, q_len, head_dim), draw(1, 2, q_len, head_dim)
        keys = [draw(1, 2, kv_len, head_dim) for kv_len in tiles]
        out = query.new_empty(1, q_len, 2, 3, head_dim)
        wanted = copied(out)
        for serving, result in ((kernel, out), (reference, wanted)):
            at = query.to(result.dtype)
            whole = serving.begin(at, scale=scale)
            square = own.to(result.dtype)
            whole.add(serving.attend(at, square, square, scale=scale, causal=True))
            for tile in keys:
                whole.attend(tile.to(result.dtype), tile.to(result.dtype))
            whole.write(result)
        yield out, wanted

    def decoded(kv_len: int) -> Iterator[tuple[torch.Tensor, ...]]:
        query = draw(1, 2, 3, 1, head_dim)
        new, past = ((draw(1, 2, n, head_dim), draw(1, 2, n, head_dim)) for n in (1, kv_len))
        doubled_past = copied(past[0]), copied(past[1])
        out = query.new_empty(1, 1, 2, 3, head_dim)
        wanted = copied(out)
        kernel.decode(query, new, past, out, scale=scale)
        doubled_new = new[0].double(), new[1].double()
        reference.decode(query.double(), doubled_new, doubled_past, wanted, scale=scale)
        yield out, wanted
        yield from zip(past, doubled_past, strict=True)

    try:
        pairs = [pair for kind in _CHECKED for pair in attended(*kind)]
        pairs += merged(*_MERGED)
        pairs += [pair for kv_len in _DECODED for pair in decoded(kv_len)]
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel, and this choice would last
    except Exception as error:  # a compiler's own kinds among them: another kernel serves
        _logger.info("%s: %s", kernel.name, error)
        return False
    for got, want in pairs:
        error_max = (got.double() - want.double()).abs().max().item()
        if not error_max <= TOLERANCE[dtype]:
            _logger.info("%s is off by %g", kernel.name, error_max)
            return False
    return True
