"""Partial attention on the CPU by torch's fused kernel, which returns the LSE.

Measured on two cores, bfloat16, 8 KV heads x 4 queries x 128K tokens: 10 GB/s of keys and values,
against 0.8 GB/s for `scaled_dot_product_attention(enable_gqa=True)`, which reads each key once for
every query head of its group.
"""

import functools

import torch

from headinfer.attend.fused_call import attend_grouped, attend_split, operator
from headinfer.attend.partial import Partial
from headinfer.attend.work import Work

_FEW_ROWS = 32
"""Up to so many folded query rows the kernel has one task a head, fewer than there may be cores."""

_BLOCK_TOKENS = 4096
"""Keys of one call with many queries: the kernel copies 16-bit keys and values to pack them, so
this bounds its memory, and ours where we convert them."""

_TILE = operator("flash_attention_for_cpu", is_causal=False)
_SQUARE = operator("flash_attention_for_cpu", is_causal=True)


class CpuKernel:
    """A kernel of torch's for the CPU: float64, float32 and 16 bits, equal key and value dims."""

    name = "torch flash attention (CPU)"

    def serves(self, work: Work) -> bool:
        """Whether it can attend a work: always."""
        return True

    def attend(self, work: Work) -> None:
        """Attend in one fused call where masks and lengths allow; see `Kernel.attend`."""
        query, scale, into, mask = work.query, work.scale, work.into, work.mask
        assert into is not None
        batch, kv_heads, group, q_len, _ = query.shape
        many, square = group * q_len > _FEW_ROWS, work.causal and q_len > 1
        grouped = square or (mask is not None and mask.shape[1] > 1)
        if not grouped:
            if into.folded is None:
                into.folded = query.contiguous().flatten(2, 3)
            query = into.folded
        converted = many and query.dtype == torch.float16
        if converted:  # loses nothing: 169 against 121 GFLOP/s in the kernel, measured
            query = query.float()
        alone = mask is None and batch == 1 and not many
        splits = torch.get_num_threads() // kv_heads if alone else 1
        for tile in work.tiles if q_len else ():  # the kernel divides by zero on empty input
            keys, values = tile.kv
            step = _BLOCK_TOKENS if many and not square else max(tile.tokens, 1)
            for start in range(0, tile.tokens, step):
                tokens = slice(start, start + step)
                block = keys[:, :, tokens], values[:, :, tokens]
                if converted:
                    block = block[0].float(), block[1].float()
                bias = None if mask is None else _bias(mask[:, :, tokens], query.dtype)
                if grouped:
                    partial = attend_grouped(
                        _SQUARE if square else _TILE, query, *block, scale, bias
                    )
                else:
                    call = _TILE if bias is None else functools.partial(_TILE, attn_mask=bias)
                    out, lse = attend_split(call, query, *block, scale, splits)
                    rows = (group, q_len)
                    partial = Partial(out.unflatten(2, rows), lse.unflatten(2, rows))
                if mask is not None:
                    partial = _without_blind_rows(partial, mask[:, :, tokens])
                into.add(partial)


def _bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask as the kernel takes it: additive, `[batch or 1, 1, q_len or 1, kv_len]`."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, -torch.inf).unsqueeze(1)


def _without_blind_rows(partial: Partial, mask: torch.Tensor) -> Partial:
    """Make queries that see nothing neutral: the kernel gives them an LSE of 0."""
    blind = ~mask.any(dim=-1)[:, None, None, :]
    return Partial(
        partial.out.masked_fill(blind.unsqueeze(-1), 0.0),
        partial.lse.masked_fill(blind, -torch.inf),
    )
