"""Partial attention in plain tensor operations: any device, any dims, softcap; in float32.

The last entry of every table, and the oracle that the results of all others are tested against.
"""

import torch

from headinfer.attend.partial import Accumulator, Partial, accumulation_dtype, join_queries
from headinfer.attend.work import Work
from headinfer.kv.extent import Tile

_MAX_SCORES = 2**23
"""Scores computed at once: 32 MiB in float32, whatever the lengths. The keys, and then the values,
that these are computed from are as many elements at most."""


class ReferenceKernel:
    """A kernel of matrix products, block by block; serves every work.

    Args:
        softcap: bound of the scores, `softcap * tanh(score / softcap)` (Gemma 2); None for none.
    """

    def __init__(self, softcap: float | None = None) -> None:
        self._softcap = softcap
        self.name = "reference" if softcap is None else f"reference (softcap {softcap:g})"

    def serves(self, work: Work) -> bool:
        """Whether it can attend a work: always."""
        return True

    def square(self, _work: Work) -> None:
        """Return None: it is no operator of torch's."""

    def attend(self, work: Work) -> None:
        """Attend in blocks of queries and keys; see `Kernel.attend`."""
        assert work.into is not None
        for tile in work.tiles if work.query.shape[3] else ():
            if tile.tokens:
                work.into.add(self._attend_tile(work, tile))

    def _attend_tile(self, work: Work, tile: Tile) -> Partial:
        (keys, values), kv_len, parts = tile.kv, tile.tokens, []
        q_len, rows = work.query.shape[3], work.query.shape[:3].numel()
        token_elements = keys.shape[:2].numel() * max(keys.shape[3], values.shape[3])
        columns = min(_MAX_SCORES // rows // min(q_len, 128), _MAX_SCORES // token_elements)
        kv_block = min(kv_len, max(columns, 1))
        q_block = max(_MAX_SCORES // rows // kv_block, 1)
        for first in range(0, q_len, q_block):
            queries = slice(first, min(first + q_block, q_len))
            total = Accumulator()
            for start in range(0, queries.stop if work.causal else kv_len, kv_block):
                tokens = slice(start, min(start + kv_block, kv_len))
                block = keys[:, :, tokens], values[:, :, tokens]
                total.add(self._block(work, queries, tokens, *block))
            merged = total.result()
            parts.append(Partial(merged.out.to(work.query.dtype), merged.lse))
        return join_queries(parts)

    def _block(
        self,
        work: Work,
        queries: slice,
        tokens: slice,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> Partial:
        """Attend some queries of a work to the keys and values of some tokens of its tile."""
        query, mask = work.query[:, :, :, queries], work.mask
        dtype, cap = accumulation_dtype(query.dtype), self._softcap
        # The few queries are scaled, and not the many scores.
        query = query.to(dtype) * (work.scale if cap is None else work.scale / cap)
        scores = torch.matmul(query, keys.to(dtype).unsqueeze(2).transpose(-1, -2))
        if cap is not None:
            scores = scores.tanh_().mul_(cap)
        if work.causal:
            rows = torch.arange(queries.start, queries.stop, device=query.device)
            columns = torch.arange(tokens.start, tokens.stop, device=query.device)
            scores.masked_fill_(columns > rows[:, None], -torch.inf)
        elif mask is not None:
            visible = mask[:, queries if mask.shape[1] > 1 else slice(None), tokens]
            scores.masked_fill_(~visible[:, None, None], -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        weights = torch.exp_(scores.sub_(lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)))
        return Partial(torch.matmul(weights, values.to(dtype).unsqueeze(2)), lse)
