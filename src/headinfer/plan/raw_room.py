"""Host memory set aside for pages that a packed form has no room for. Pure arithmetic.

How many pages of a layer's chunk are such is known late. Until then all of them count. So the
thread that launches kernels is ahead of a device by as many layers as this room is for.
"""

from dataclasses import dataclass

from headinfer.plan.format import Format
from headinfer.plan.memory import KEYS_AND_VALUES, covering_tokens
from headinfer.plan.shape import ModelShape

_LEAD_TOKENS = 2**15
"""Tokens of layers that the thread is ahead by: 4 layers with chunks of 8K tokens.

It needs a lead while it launches the layers of other devices, and where memory is being locked.
With shorter chunks these are more layers in the same bytes.
"""

LEAST_LEAD = 2
"""Layers of a chunk that the thread is ahead by, whatever the chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RawRoom:
    """A room for pages as they are, in blocks that are taken when they are needed.

    Attributes:
        slot_bytes: of a page as it is, of keys or values, in the layer where that is largest.
        chunk_slots: pages of a chunk of one layer, in the layer where they are most.
        block_chunks: chunks of one layer that a block has slots for.
        blocks: there are at most, while pages of older ones are not all in use.
    """

    slot_bytes: int
    chunk_slots: int
    block_chunks: int
    blocks: int

    @property
    def slots(self) -> int:
        """Slots of all blocks."""
        return self.blocks * self.block_chunks * self.chunk_slots

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return self.slots * self.slot_bytes


def raw_room(
    shape: ModelShape, *, chunk_tokens: int, batch: int, context_tokens: int | None
) -> RawRoom:
    """Return the room for the packed pages of chunks, should all of them be such.

    A device that a chunk comes to after n others has n chunks to do while the next one passes
    these. All of its layers of those chunks are launched, or one device would wait for another.
    So it has room for them beside the lead.

    Args:
        shape: of the layers on one device.
        chunk_tokens: tokens of a chunk.
        batch: rows.
        context_tokens: tokens expected in each row, which may be fewer; None where not known.
    """
    layers = shape.packed_layers
    dims = [max(layer.key_dim, layer.value_dim) for layer in layers]
    heads = max((layer.kv_heads for layer in layers), default=0)
    lead = max(min(_LEAD_TOKENS // chunk_tokens, len(layers)), LEAST_LEAD)
    ahead = lead + shape.stage * len(layers)
    if context_tokens is not None:
        ahead = min(ahead, -(-context_tokens // chunk_tokens) * len(layers))
    rows = Format.PACKED.rows(covering_tokens(Format.PACKED, chunk_tokens))
    return RawRoom(
        slot_bytes=Format.PACKED.row_tokens * max(dims, default=0) * shape.kv_itemsize,
        chunk_slots=KEYS_AND_VALUES * batch * heads * rows,
        block_chunks=lead,
        blocks=max(-(-ahead // lead), 1),
    )


def begun_page_bytes(shape: ModelShape, *, batch: int) -> int:
    """Bytes of host memory for a page of each layer that is not full."""
    begun = sum(
        layer.kv_heads * max(layer.key_dim, layer.value_dim) for layer in shape.packed_layers
    )
    return Format.PACKED.row_tokens * KEYS_AND_VALUES * batch * begun * shape.kv_itemsize
