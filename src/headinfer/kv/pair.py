"""Keys and values together, and the shape they have in one layer."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from headinfer.plan.format import Format

ALL_HEADS = slice(None)


class KV(NamedTuple):
    """A pair of keys and values of the same tokens.

    Those of packed pages have a page for a token, and its bytes for a dim.

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
    """A layer's shape and dtype of keys and values, and the form they have in some memory.

    Attributes:
        batch: rows of the cache.
        kv_heads: key/value heads.
        key_dim: elements of one key.
        value_dim: elements of one value.
        dtype: of keys and values, as they are computed.
        format: in which they lie.
    """

    batch: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    format: Format = Format.DENSE

    def num_bytes(self, tokens: int, *, heads: int | None = None) -> int:
        """Bytes of `tokens` tokens of `heads` heads (all by default), keys and values together."""
        heads = self.kv_heads if heads is None else heads
        return self.batch * heads * self.format.rows(tokens) * sum(self._row_bytes)

    @property
    def _row_bytes(self) -> tuple[int, int]:
        """Bytes of a row of one head's keys, and of its values."""
        form, itemsize = self.format, self.dtype.itemsize
        return form.row_bytes(self.key_dim, itemsize), form.row_bytes(self.value_dim, itemsize)

    def carve(self, buffer: torch.Tensor, tokens: int, *, heads: int | None = None) -> KV:
        """View a uint8 buffer as contiguous keys and values.

        Args:
            buffer: at least `num_bytes(tokens, heads=heads)` bytes.
            tokens: tokens of the views.
            heads: heads of the views; all by default.

        Returns:
            Keys `[batch, heads, tokens, key_dim]` and values `[batch, heads, tokens, value_dim]`,
            both views of `buffer`. Packed ones are of uint8, in pages.
        """
        heads = self.kv_heads if heads is None else heads
        dtype = self.dtype if self.format is Format.DENSE else torch.uint8
        shape = (self.batch, heads, self.format.rows(tokens))
        num_rows, row_bytes = math.prod(shape), self._row_bytes
        num_bytes = num_rows * sum(row_bytes)

        def views() -> KV:
            cut = buffer if buffer.numel() == num_bytes else buffer[:num_bytes]
            whole, parts = cut.view(dtype), []
            first = whole.storage_offset()
            for dim in (size // dtype.itemsize for size in row_bytes):
                strides = (heads * shape[2] * dim, shape[2] * dim, dim, 1)
                parts.append(whole.as_strided((*shape, dim), strides, first))
                first += num_rows * dim
            return KV(*parts)

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
