"""Attention within a window without masks on CUDA.

A mask of a chunk of 8K queries is made, and read, in many blocks. Torch's flash attention skips
what lies beside the window by itself, and so does our own program where scores are bounded.
"""

import functools
import logging
from collections.abc import Callable

import torch

from headinfer.attend.masks import band_works
from headinfer.attend.partial import Accumulator, Partial
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.work import tile_in_hand
from headinfer.kv.pair import KV

_logger = logging.getLogger(__name__)

_TOLERANCE = 5e-2
_MOST_DIM = 256

_CHECKED = ((9, 9, 4), (40, 70, 7), (33, 64, 33))
"""Queries, keys, and the window's tokens, of what is compared with the reference."""

Band = Callable[[torch.Tensor, KV, float, int], Partial]
"""A call of query `[batch, kv_heads, group, q_len, dim]`, the keys and values, scale and window.

The last query's own key is the last key. Each query sees so many keys up to its own.
"""


@functools.cache
def find_band(
    torch_device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None = None
) -> Band | None:
    """Return a call that agrees with the reference here; None where there is none.

    Args:
        torch_device: where the tensors live.
        dtype: of queries, keys and values.
        head_dim: elements of one key, and of one value.
        softcap: bound of the scores, or None.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    if torch_device.type != "cuda" or not half or head_dim % 8 or head_dim > _MOST_DIM:
        return None
    try:
        band = _flash if softcap is None else _capped(torch_device, head_dim, softcap)
        agrees = all(
            _agrees(band, torch_device, dtype, head_dim, softcap, *sizes) for sizes in _CHECKED
        )
    except torch.OutOfMemoryError:
        raise  # says nothing about the call
    except Exception as error:  # a private operator, or no Triton: their arguments may be others
        _logger.info("no attention within windows without masks: %s", error)
        return None
    if not agrees:
        _logger.info("attention within windows without masks fails its check here")
    return band if agrees else None


def _capped(torch_device: torch.device, head_dim: int, softcap: float) -> Band:
    from headinfer.attend.fused_chunk import TritonChunks  # not every system has Triton

    return TritonChunks.on(torch_device, head_dim, softcap).band


def _flash(query: torch.Tensor, kv: KV, scale: float, window_tokens: int) -> Partial:
    """Attend within a window; see `Band`."""
    q_len, kv_len = query.shape[3], kv.tokens
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query.flatten(1, 2).transpose(1, 2),
        *(part.transpose(1, 2) for part in kv),
        None,
        None,
        q_len,
        kv_len,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=window_tokens - 1,
        window_size_right=0,
    )
    heads = query.shape[1:3]
    return Partial(out.transpose(1, 2).unflatten(1, heads), lse[..., :q_len].unflatten(1, heads))


def _agrees(
    band: Band,
    torch_device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    softcap: float | None,
    q_len: int,
    kv_len: int,
    window_tokens: int,
) -> bool:
    generator, reference = torch.Generator().manual_seed(0), ReferenceKernel(softcap)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(torch_device, dtype)

    query = draw(1, 2, 3, q_len, head_dim)
    kv = KV(draw(1, 2, kv_len, head_dim), draw(1, 2, kv_len, head_dim))
    scale = head_dim**-0.5 * (softcap or 1.0)  # so that a bound is felt
    ours, total = band(query, kv, scale, window_tokens), Accumulator()
    exact = KV(*(part.double() for part in kv))
    for work in band_works(
        query.double(),
        tile_in_hand(exact),
        scale=scale,
        into=total,
        window_tokens=window_tokens,
        padding=None,
    ):
        reference.attend(work)
    wanted = total.result()
    pairs = ((ours.out, wanted.out), (ours.lse, wanted.lse))
    return all((got.double() - want).abs().max().item() <= _TOLERANCE for got, want in pairs)
