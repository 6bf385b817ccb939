"""New tokens of one layer on their way through its attention."""

import dataclasses
from dataclasses import dataclass, field

import torch

from headinfer.attend.masks import Padding
from headinfer.attend.table import Kernels
from headinfer.attend.work import Total, by_kv_head
from headinfer.kv.pair import KV


@dataclass(slots=True, kw_only=True)
class Chunk:
    """A layer's new tokens and how they attend.

    Attributes:
        queries: `[batch, query_heads, q_len, key_dim]` on the device.
        new: the new tokens' keys and values `[batch, kv_heads, q_len, dim]`.
        kernels: what computes partials on the device.
        scale: factor of the scores.
        padding: of the tokens from `padding_start` on, past and new; None when there is none.
        sinks: scores `[kv_heads, group]` of attention sinks, or None.
        window_tokens: tokens that each query sees in a window, its own included; None for all.
        host_kernels: what computes partials on the CPU for the device; None where nothing may.
        past_tokens: tokens of the layer before these.
        padding_start: position of the first token that `padding` tells of.
        tokens: number of new tokens.
        waiting: groups of heads whose result waits for the host's answer, each with its total.
        result: where the result goes, or is, `[batch, q_len, query_heads, value_dim]`; None until
            there is a place. See `out`.
    """

    queries: torch.Tensor
    new: KV
    kernels: Kernels
    scale: float
    padding: Padding | None
    sinks: torch.Tensor | None
    window_tokens: int | None = None
    host_kernels: Kernels | None = None
    past_tokens: int = 0
    padding_start: int = 0
    tokens: int
    waiting: list[tuple[slice, Total]] = field(default_factory=list)
    result: torch.Tensor | None = None
    _query: torch.Tensor | None = field(default=None, init=False)

    @property
    def query(self) -> torch.Tensor:
        """The queries by KV head, `[batch, kv_heads, group, q_len, key_dim]`.

        They are viewed so when that is asked for: a view takes microseconds.
        """
        query = self._query
        if query is None:
            query = self._query = by_kv_head(self.queries, self.new)
        return query

    @property
    def whole(self) -> torch.Tensor:
        """The `result`, whose memory is made when it is needed."""
        if self.result is None:
            self.have_place()
        assert self.result is not None
        return self.result

    @property
    def out(self) -> torch.Tensor:
        """The `whole` by KV head, `[batch, q_len, kv_heads, group, value_dim]`: a view."""
        batch, q_len, query_heads, dim = (whole := self.whole).shape
        kv_heads = self.new.keys.shape[1]
        return whole.view(batch, q_len, kv_heads, query_heads // kv_heads, dim)

    def have_place(self) -> None:
        """Have memory for the result now, for whatever computes it."""
        batch, query_heads, q_len, _ = self.queries.shape
        shape = batch, q_len, query_heads, self.new.values.shape[3]
        self.result = self.queries.new_empty(shape)

    def part(self, first: int, tokens: int) -> "Chunk":
        """Return at most `tokens` of the tokens as a chunk of their own."""
        part = slice(first, min(first + tokens, self.tokens))
        return dataclasses.replace(
            self,
            queries=self.queries[:, :, part],
            new=self.new.cut(part),
            result=self.whole[:, part],
            tokens=part.stop - part.start,
            waiting=[],
        )

    def of_heads(
        self,
        queries: torch.Tensor,
        new: KV,
        sinks: torch.Tensor | None,
        window_tokens: int | None,
    ) -> "Chunk":
        """Return a chunk of some heads, whose result goes to memory of its own."""
        return dataclasses.replace(
            self,
            queries=queries,
            new=new,
            result=None,
            sinks=sinks,
            window_tokens=window_tokens,
            waiting=[],
        )

    def padding_of(self, start: int, end: int) -> torch.Tensor | None:
        """Return the mask `[batch, 1, end - start]` of some tokens; None where all are valid."""
        if self.padding is None:
            return None
        return self.padding.of_tokens(start - self.padding_start, end - self.padding_start)

    def finish(self, heads: slice, total: Total) -> None:
        """Put what was merged for some heads into `out`."""
        if self.sinks is not None:
            total.add_sinks(self.sinks[heads])
        total.write(self.out[:, :, heads])

    def finish_alone(self, total: Total) -> bool:
        """Have the output of the only partial be the result, where nothing is to be copied.

        The result has no place yet, and there are no sinks.

        Args:
            total: of all heads. The partial's memory is nobody else's.

        Returns:
            Whether it is.
        """
        alone = total.alone(self.queries.dtype)
        if alone is None:
            return False
        self.result = alone.flatten(2, 3)
        return True
