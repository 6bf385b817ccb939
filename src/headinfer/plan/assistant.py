"""What an assistant takes of a device, beside the model that it drafts for: pure arithmetic."""

from dataclasses import dataclass

from headinfer.plan import memory
from headinfer.plan.shape import ModelShape

READ_TOKENS = 2048
"""Tokens of a prompt that an assistant reads at once."""

_MASK_BYTES = 1
"""A mask's element as transformers makes it; attention makes another one of it, in its dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssistantBytes:
    """A count of the bytes that assistants take of one device.

    Attributes:
        weights_bytes: of their parameters and buffers, which are there already.
        working_bytes: of their KV caches and activations, which are still to come.
    """

    weights_bytes: int = 0
    working_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.working_bytes

    def __add__(self, other: "AssistantBytes") -> "AssistantBytes":
        """Return what both take."""
        return AssistantBytes(
            weights_bytes=self.weights_bytes + other.weights_bytes,
            working_bytes=self.working_bytes + other.working_bytes,
        )


NO_ASSISTANT = AssistantBytes()


def working_bytes(shape: ModelShape, tokens: int, *, device: str) -> int:
    """Return an estimate of what a model takes to draft with transformers' own attention and cache.

    These are the KV cache, and the copies of one layer's part of it while that grows and is
    attended. The mask and the activations are those of the most tokens that are read at once.

    Args:
        shape: of the assistant.
        tokens: of prompt and answer.
        device: "cpu", "cuda" or "simulated", where it computes.
    """
    item, read = shape.kv_itemsize, min(tokens, READ_TOKENS)
    elements = [layer.elements_per_token for layer in shape.attention_layers]
    repeated = [
        shape.query_heads * (layer.key_dim + layer.value_dim)
        for layer in shape.attention_layers
        if shape.query_heads > layer.kv_heads
    ]
    copies = max(elements, default=0) + max(repeated, default=0)
    cache = (sum(elements) + copies) * tokens * item
    mask = read * tokens * (_MASK_BYTES + item)
    heads = max((layer.kv_heads for layer in shape.attention_layers), default=0)
    return (
        cache
        + mask
        + memory.activation_bytes(
            shape, chunk_tokens=read, tile_heads=heads, batch=1, device=device
        )
    )
