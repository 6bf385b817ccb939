"""Keys and values together, and the shape they have in one layer."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

ALL_HEADS = slice(None)


class KV(NamedTuple):
    """A pair of keys and values of the same tokens.

    Attributes:
        keys: `[batch, kv_heads, tokens, key_dim]`.
        values: `[batch, kv_heads, tokens, value_dim]`, of the same dtype and device.
    """

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.keys.shape[2]

    def cut(self, tokens: slice, heads: slice = ALL_HEADS) -> "KV":
        """Return views of some tokens of some heads."""
        return KV(self.keys[:, heads, tokens], self.values[:, heads, tokens])

    def copy_(self, source: "KV") -> None:
        """Overwrite with keys and values of the same shapes, on the stream that is current."""
        self.keys.copy_(source.keys)
        self.values.copy_(source.values)


@dataclass(frozen=True, slots=True)
class Geometry:
    """A layer's shape and dtype of keys and values.

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

    def carve(self, buffer: torch.Tensor, tokens: int, *, heads: int | None = None) -> KV:
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

        def views() -> KV:
            keys = buffer[:key_bytes].view(self.dtype).view(*shape, self.key_dim)
            values = buffer[key_bytes:all_bytes].view(self.dtype).view(*shape, self.value_dim)
            return KV(keys, values)

        if not torch.is_inference_mode_enabled():
            return views()  # leaving the mode takes longer than the views do
        # A view that changes the dtype in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            return views()


Carve = Callable[[Geometry, int, int | None], KV]

_CARVED_SIZES = 8
"""Views that are kept: of whole tiles or pages, and of a layer's last tile, which grows."""


def carver(buffer: torch.Tensor) -> Carve:
    """Return `Geometry.carve` of one buffer, which remembers the views it made last.

    Making them takes longer than all else that a small tile or a new token needs.
    """

    @functools.lru_cache(_CARVED_SIZES)
    def carve(geometry: Geometry, tokens: int, heads: int | None) -> KV:
        return geometry.carve(buffer, tokens, heads=heads)

    return carve
