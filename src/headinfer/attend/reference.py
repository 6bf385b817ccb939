"""Partial attention in plain tensor operations: any device, any dims, softcap; in float32.

The fallback of the fused kernels and the oracle their results are tested against.
"""

import torch

from headinfer.attend.partial import Accumulator, Kernel, Partial, accumulation_dtype, empty_partial

_MAX_SCORES = 2**23
"""Scores computed at once: 32 MiB in float32, whatever the lengths."""


class ReferenceKernel(Kernel):
    """Blocked attention by matrix products.

    Args:
        softcap: bound of the scores, `softcap * tanh(score / softcap)` (Gemma 2); None for none.
    """

    def __init__(self, softcap: float | None = None) -> None:
        self._softcap = softcap
        self.name = "reference" if softcap is None else f"reference (softcap {softcap:g})"

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        causal: bool = False,
        mask: torch.Tensor | None = None,
    ) -> Partial:
        """Attend in blocks of queries and keys; see `Kernel.attend`."""
        q_len, kv_len = query.shape[3], keys.shape[2]
        if q_len == 0 or kv_len == 0:
            return empty_partial(query, values.shape[3])
        rows = query.shape[0] * query.shape[1] * query.shape[2]
        kv_block = min(kv_len, max(_MAX_SCORES // rows // min(q_len, 128), 1))
        q_block = max(_MAX_SCORES // rows // kv_block, 1)
        parts = []
        for first in range(0, q_len, q_block):
            queries = slice(first, min(first + q_block, q_len))
            total = Accumulator()
            for start in range(0, queries.stop if causal else kv_len, kv_block):
                tokens = slice(start, min(start + kv_block, kv_len))
                visible = (
                    _visible(mask, queries, tokens, query.device)
                    if causal or (mask is not None)
                    else None
                )
                total.add(
                    self._block(
                        query[:, :, :, queries],
                        keys[:, :, tokens],
                        values[:, :, tokens],
                        scale,
                        visible,
                    )
                )
            parts.append(total.result())
        out = torch.cat([part.out for part in parts], dim=3).to(query.dtype)
        return Partial(out, torch.cat([part.lse for part in parts], dim=3))

    def _block(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        visible: torch.Tensor | None,
    ) -> Partial:
        dtype = accumulation_dtype(query.dtype)
        scores = torch.matmul(query.to(dtype), keys.to(dtype).unsqueeze(2).transpose(-1, -2))
        scores *= scale
        if self._softcap is not None:
            scores = scores.div_(self._softcap).tanh_().mul_(self._softcap)
        if visible is not None:
            scores.masked_fill_(~visible[:, None, None], -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp_(scores.sub_(lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)))
        return Partial(torch.matmul(weights, values.to(dtype).unsqueeze(2)), lse)


def _visible(
    mask: torch.Tensor | None, queries: slice, tokens: slice, device: torch.device
) -> torch.Tensor:
    """Return bool `[batch or 1, q_len or 1, kv_len]` of a block; without a mask it is causal."""
    if mask is not None:
        return mask[:, queries if mask.shape[1] > 1 else slice(None), tokens]
    rows = torch.arange(queries.start, queries.stop, device=device)
    columns = torch.arange(tokens.start, tokens.stop, device=device)
    return (columns[None, :] <= rows[:, None])[None]
