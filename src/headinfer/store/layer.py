"""One layer's KV cache in host memory (the paper's section 3.2, "CPU memory holds all heads").

Keys of one head are contiguous over the tokens of a segment, so a tile is a contiguous piece of
each head. Segments are reserved for the expected length; when a cache outgrows it, another segment
follows and no old token is copied.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from headinfer.device.base import Device

_MIN_GROWTH_TOKENS = 256
_GROWTH_DIVISOR = 8  # an unplanned segment adds an eighth: at most 12.5% of the cache is unused


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """Shape and dtype of one layer's keys and values.

    Attributes:
        batch: rows of the cache.
        kv_heads: key/value heads.
        key_dim: elements of one key.
        value_dim: elements of one value.
        dtype: of keys and values.
    """

    batch: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    def num_bytes(self, tokens: int, *, heads: int | None = None) -> int:
        """Bytes of `tokens` tokens of `heads` heads (all by default), keys and values together."""
        heads = self.kv_heads if heads is None else heads
        elements = self.batch * heads * tokens * (self.key_dim + self.value_dim)
        return elements * self.dtype.itemsize

    def carve(
        self, buffer: torch.Tensor, tokens: int, *, heads: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """View a uint8 buffer as contiguous keys and values.

        Args:
            buffer: at least `num_bytes(tokens, heads=heads)` bytes.
            tokens: tokens of the views.
            heads: heads of the views; all by default.

        Returns:
            Keys `[batch, heads, tokens, key_dim]` and values `[batch, heads, tokens, value_dim]`,
            both views of `buffer`.
        """
        heads = self.kv_heads if heads is None else heads
        rows = self.batch * heads * tokens
        key_bytes = rows * self.key_dim * self.dtype.itemsize
        all_bytes = self.num_bytes(tokens, heads=heads)
        shape = (self.batch, heads, tokens)

        def views() -> tuple[torch.Tensor, torch.Tensor]:
            keys = buffer[:key_bytes].view(self.dtype).view(*shape, self.key_dim)
            values = buffer[key_bytes:all_bytes].view(self.dtype).view(*shape, self.value_dim)
            return keys, values

        if not torch.is_inference_mode_enabled():
            return views()  # leaving the mode takes longer than the views do
        # A view that changes the dtype in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            return views()


Carve = Callable[[KVGeometry, int, int | None], tuple[torch.Tensor, torch.Tensor]]

_CARVED_SIZES = 8
"""Views that are kept: of whole tiles or pages, and of a layer's last tile, which grows."""


def carver(buffer: torch.Tensor) -> Carve:
    """Return `KVGeometry.carve` of one buffer, which remembers the views it made last.

    Making them takes longer than all else that a small tile or a new token needs.
    """

    @functools.lru_cache(_CARVED_SIZES)
    def carve(
        geometry: KVGeometry, tokens: int, heads: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return geometry.carve(buffer, tokens, heads=heads)

    return carve


@dataclass(slots=True)
class Segment:
    """A stretch of tokens; `buffer` is owned, `keys` and `values` are views of it."""

    start: int
    capacity: int
    buffer: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def end(self) -> int:
        """One past the last token there is memory for."""
        return self.start + self.capacity


@dataclass(frozen=True, slots=True)
class Span:
    """Views of `tokens` consecutive tokens: keys and values `[batch, heads, tokens, dim]`."""

    start: int
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.keys.shape[2]

    def of_heads(self, heads: slice) -> "Span":
        """Return the tokens of some heads."""
        return Span(self.start, self.keys[:, heads], self.values[:, heads])


class Stretch(NamedTuple):
    """`tokens` consecutive tokens of larger tensors, of which no view is made: that takes longer.

    Attributes:
        keys: `[batch, kv_heads, capacity, key_dim]`.
        values: `[batch, kv_heads, capacity, value_dim]`.
        first: position of the first token in both.
        tokens: number of tokens.
    """

    keys: torch.Tensor
    values: torch.Tensor
    first: int
    tokens: int


class LayerStore:
    """Keys and values of one layer's past tokens, in host memory it owns.

    Every method but `reserve` and `extend` that changes what is stored must be called with no copy
    in flight that touches the store; the engine waits before it calls one.

    Attributes:
        geometry: shapes and dtype.
        tokens: tokens stored.
        version: changes whenever a stored token is changed, moved, dropped or added, so that tiles
            fetched ahead of time can be told stale.
    """

    def __init__(self, device: Device, geometry: KVGeometry) -> None:
        self.geometry = geometry
        self.tokens = 0
        self.version = 0
        self._written_tokens = 0
        self._device = device
        self._segments: list[Segment] = []

    @property
    def capacity(self) -> int:
        """Tokens there is memory for."""
        return self._segments[-1].end if self._segments else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory held."""
        return sum(segment.buffer.numel() for segment in self._segments)

    @property
    def unwritten_bytes(self) -> int:
        """Bytes of those that were reserved and never written."""
        return max(self.num_bytes - self.geometry.num_bytes(self._written_tokens), 0)

    def missing_tokens(self, tokens: int) -> int:
        """Return the tokens `reserve` would add: exactly what is missing for the first segment.

        A store that outgrows its segments grows by an eighth at least, so that a token at a time
        does not make a segment, and so a tile, of each.
        """
        missing = tokens - self.capacity
        if missing <= 0 or not self._segments:
            return max(missing, 0)
        return max(missing, self.capacity // _GROWTH_DIVISOR, _MIN_GROWTH_TOKENS)

    def reserve(self, tokens: int) -> None:
        """Have memory for `tokens` tokens in all, in one segment more if needed.

        Raises:
            MemoryPlanError: the host memory cannot be had.
        """
        missing = self.missing_tokens(tokens)
        if missing > 0:
            buffer = self._device.host_empty(self.geometry.num_bytes(missing))
            keys, values = self.geometry.carve(buffer, missing)
            self._segments.append(Segment(self.capacity, missing, buffer, keys, values))

    def extend(self, tokens: int) -> list[Span]:
        """Lengthen the store by `tokens` and return where they must be written, in order."""
        start, end = self.tokens, self.tokens + tokens
        self.reserve(end)
        self.tokens = end
        self._written_tokens = max(self._written_tokens, end)
        self.version += 1
        return list(self.spans(start, end))

    def spans(
        self, start: int, end: int, *, max_tokens: int | None = None, heads: slice = slice(None)
    ) -> Iterator[Span]:
        """Yield views of the tokens from `start` to before `end`, in order.

        Args:
            start: first token.
            end: one past the last.
            max_tokens: the most a span may have; spans never cross segments either.
            heads: which KV heads.
        """
        for segment in self._segments:
            low, high = max(start, segment.start), min(end, segment.end)
            step = max_tokens or max(high - low, 1)
            for first in range(low, high, step):
                part = slice(first - segment.start, min(first + step, high) - segment.start)
                yield Span(
                    first, segment.keys[:, heads, part, :], segment.values[:, heads, part, :]
                )

    def stretches(self, start: int, end: int) -> list[Stretch]:
        """Return where the tokens from `start` to before `end` lie, in order."""
        return [
            Stretch(segment.keys, segment.values, low - segment.start, high - low)
            for segment in self._segments
            if (low := max(start, segment.start)) < (high := min(end, segment.end))
        ]

    def copy_from(self, other: "LayerStore") -> None:
        """Hold what another store of the same geometry holds; this one must be empty.

        Both must be at rest: the host copies.

        Raises:
            MemoryPlanError: the host memory cannot be had.
        """
        assert not self.tokens
        assert self.geometry == other.geometry
        self.extend(other.tokens)
        for store, write in ((other, False), (self, True)):
            for segment in store._segments:
                self._device.host_access(segment.buffer, write=write, purpose="copy of a store")
        for source in other.spans(0, other.tokens):
            for span in self.spans(source.start, source.start + source.tokens):
                first = span.start - source.start
                part = slice(first, first + span.tokens)
                span.keys.copy_(source.keys[:, :, part])
                span.values.copy_(source.values[:, :, part])

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens; their memory stays reserved."""
        assert 0 <= tokens <= self.tokens
        self.tokens = tokens
        self.version += 1

    def select(self, rows: Sequence[int]) -> None:
        """Make row `i` of the cache what row `rows[i]` was; rows may repeat or be left out.

        With as many rows as before this happens in place, one head at a time, so that it takes no
        more memory than one head; otherwise segment by segment into new memory.
        """
        index = torch.tensor(rows, dtype=torch.long, device="cpu")
        in_place = len(rows) == self.geometry.batch
        if not in_place:
            self._written_tokens = self.tokens
        old = self.geometry
        self.geometry = KVGeometry(len(rows), old.kv_heads, old.key_dim, old.value_dim, old.dtype)
        for position, segment in enumerate(self._segments):
            used = max(min(self.tokens, segment.end) - segment.start, 0)
            self._device.host_access(segment.buffer, write=in_place, purpose="row selection")
            target = segment
            if not in_place:
                buffer = self._device.host_empty(self.geometry.num_bytes(segment.capacity))
                keys, values = self.geometry.carve(buffer, segment.capacity)
                target = Segment(segment.start, segment.capacity, buffer, keys, values)
                self._device.host_access(buffer, write=True, purpose="row selection")
            for head in range(old.kv_heads):
                for source, destination in (
                    (segment.keys, target.keys),
                    (segment.values, target.values),
                ):
                    chosen = source[:, head, :used].index_select(0, index)
                    destination[:, head, :used].copy_(chosen)
            self._segments[position] = target
        self.version += 1

    def clear(self) -> None:
        """Forget all tokens and free all memory."""
        for segment in self._segments:
            self._device.host_access(segment.buffer, write=True, purpose="freeing the store")
        self._segments.clear()
        self.tokens = self._written_tokens = 0
        self.version += 1
