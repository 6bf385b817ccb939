"""Two ways to count bytes: what runs of ours peak at, and the paper's Table 10."""

import enum
import math
from dataclasses import dataclass

from headinfer.plan import memory
from headinfer.plan.shape import LayerKind, ModelShape

PAPER_CHUNK_TOKENS = 10 * 1024
"""The paper's prefill chunk (section 3.4)."""


class AccountingKind(str, enum.Enum):
    """The name of an accounting."""

    OURS = "ours"
    PAPER = "paper"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounting:
    """A way of counting the bytes of a model's KV and activations.

    Attributes:
        kind: ours or the paper's.
        shape: the model.
        batch: rows.
        device: "cuda" or "cpu".
    """

    kind: AccountingKind
    shape: ModelShape
    batch: int = 1
    device: str = "cuda"

    @property
    def is_paper(self) -> bool:
        """Whether this is the paper's accounting."""
        return self.kind is AccountingKind.PAPER

    @property
    def buffers(self) -> int:
        """Tiles on the device at once: two in the paper, one more here."""
        return 2 if self.is_paper else memory.STAGING_BUFFERS

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the KV that methods move or keep; the paper knows no sliding windows."""
        if not self.is_paper:
            return self.shape.kv_bytes(tokens, self.batch)
        elements = sum(
            track.elements_per_token
            for layer in self.shape.layers
            for track in layer.tracks
            if track.kind is layer.kind  # heads that stream keep nothing that grows
        )
        return self.batch * tokens * elements * self.shape.kv_itemsize

    def layer_kv_bytes(self, tokens: int, heads: int | None = None) -> int:
        """Bytes of some KV heads, or all, of the widest layer whose KV `kv_bytes` counts."""
        elements = [
            min(heads or layer.kv_heads, layer.kv_heads) * (layer.key_dim + layer.value_dim)
            for layer in self.shape.layers
            if layer.kind is LayerKind.FULL or (self.is_paper and layer.kv_heads)
        ]
        return self.batch * tokens * max(elements, default=0) * self.shape.kv_itemsize

    def windows_bytes(self, new_tokens: int) -> int:
        """Bytes of sliding windows, which stay on the device; none in the paper."""
        return 0 if self.is_paper else self.shape.window_bytes(new_tokens, self.batch)

    def write_back_bytes(self, chunk_tokens: int, page_tokens: int) -> int:
        """Bytes of the pages in which new tokens go back to the host; none in the paper."""
        if self.is_paper:
            return 0
        pages = memory.tail_bytes(self.shape, page_tokens=page_tokens, batch=self.batch)
        return pages + memory.chunk_page_bytes(
            self.shape, chunk_tokens=chunk_tokens, batch=self.batch
        )

    def activation_bytes(self, chunk_tokens: int, *, tile_heads: int = 0) -> int:
        """Bytes of activations while `chunk_tokens` tokens of each row pass through the model.

        The paper's are 2 bytes x (2 x intermediate width + hidden size) for each token.
        """
        if not self.is_paper:
            return memory.activation_bytes(
                self.shape,
                chunk_tokens=chunk_tokens,
                tile_heads=tile_heads,
                batch=self.batch,
                device=self.device,
            )
        elements = 2 * self.shape.mlp_width + self.shape.hidden_size
        return self.batch * chunk_tokens * elements * self.shape.kv_itemsize

    @property
    def runtime_bytes(self) -> int:
        """Bytes that CUDA takes beside weights, KV and activations; not counted by the paper."""
        return 0 if self.is_paper else memory.runtime_bytes(self.device)

    def quantised_share(self) -> float:
        """Bits of a KV element quantised to 4 bits, over its bits as computed.

        We count a 16-bit scale and a 16-bit zero for each 64 elements; the paper counts neither.
        """
        bits = 4 if self.is_paper else 4 + 32 / 64
        return bits / (8 * self.shape.kv_itemsize)

    def quantised_bytes(self, tokens: int) -> int:
        """Bytes of the KV quantised to 4 bits; we count one layer unpacked beside it."""
        packed = math.ceil(self.quantised_share() * self.kv_bytes(tokens))
        return packed if self.is_paper else packed + self.layer_kv_bytes(tokens)
