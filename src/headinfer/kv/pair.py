"""Keys and values together, and the shape they have in one layer."""

from dataclasses import dataclass, field
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
    # Bytes of a row of one head's keys, and of its values. Asked for several times a layer.
    _row_bytes: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Count the bytes of a row."""
        form, itemsize = self.format, self.dtype.itemsize
        row_bytes = form.row_bytes(self.key_dim, itemsize), form.row_bytes(self.value_dim, itemsize)
        object.__setattr__(self, "_row_bytes", row_bytes)

    def num_bytes(self, tokens: int, *, heads: int | None = None) -> int:
        """Bytes of `tokens` tokens of `heads` heads (all by default), keys and values together."""
        heads = self.kv_heads if heads is None else heads
        rows = -(-tokens // self.format.row_tokens)
        return self.batch * heads * rows * (self._row_bytes[0] + self._row_bytes[1])

    def carve(self, buffer: torch.Tensor, tokens: int, *, heads: int | None = None) -> KV:
        """View a uint8 buffer as contiguous keys and values.

        Args:
            buffer: at least `num_bytes(tokens, heads=heads)` bytes; or several buffers, `[number,
                num_bytes]`. Views of all of them have that axis in front.
            tokens: tokens of the views.
            heads: heads of the views; all by default.

        Returns:
            Keys `[batch, heads, tokens, key_dim]` and values `[batch, heads, tokens, value_dim]`,
            both views of `buffer`. Packed ones are of uint8, in pages.
        """
        if not torch.is_inference_mode_enabled():
            return self._views(buffer, tokens, heads)  # leaving the mode takes longer than that
        # A view that changes the dtype in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            return self._views(buffer, tokens, heads)

    def _views(self, buffer: torch.Tensor, tokens: int, heads: int | None) -> KV:
        heads = self.kv_heads if heads is None else heads
        dtype = self.dtype if self.format is Format.DENSE else torch.uint8
        rows, (key_bytes, value_bytes) = self.format.rows(tokens), self._row_bytes
        key_dim, value_dim = key_bytes // dtype.itemsize, value_bytes // dtype.itemsize
        num_bytes = self.num_bytes(tokens, heads=heads)
        whole = (buffer if buffer.shape[-1] == num_bytes else buffer[..., :num_bytes]).view(dtype)
        first, pitch = whole.storage_offset(), whole.stride()[:-1]
        shape, step = (*whole.shape[:-1], self.batch, heads, rows), rows * key_dim
        keys = whole.as_strided((*shape, key_dim), (*pitch, heads * step, step, key_dim, 1), first)
        first, step = first + self.batch * heads * step, rows * value_dim
        steps = (*pitch, heads * step, step, value_dim, 1)
        return KV(keys, whole.as_strided((*shape, value_dim), steps, first))

    def joint(self, whole: KV, first: int, tokens: int) -> torch.Tensor | None:
        """View some tokens' keys, and their values behind these, as one tensor.

        Args:
            whole: views that `carve` made of one buffer, for all heads.
            first: the first of the tokens.
            tokens: number of them.

        Returns:
            `[2 * batch, kv_heads, tokens, dim]`; None where keys and values have other dims.
        """
        if self.key_dim != self.value_dim:
            return None
        keys, dim = whole.keys, self.key_dim
        shape = 2 * self.batch, self.kv_heads, tokens, dim
        return keys.as_strided(shape, keys.stride(), keys.storage_offset() + first * dim)
