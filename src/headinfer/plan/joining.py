"""The plans of several devices as one."""

from collections.abc import Sequence
from dataclasses import replace

from headinfer.plan.assistant import NO_ASSISTANT
from headinfer.plan.plan import Plan
from headinfer.plan.shape import ModelShape


def joined(shape: ModelShape, parts: Sequence[Plan]) -> Plan:
    """Return the plan of a model whose layers lie on several devices; with one it is that plan.

    Its bytes are those of all devices together. Its tiles and blocks are the largest of any, and
    its resident tokens those that all layers keep. It has no blocks above a disk where a device
    whose layers need some has none.

    Args:
        shape: the whole model.
        parts: a plan for the layers of each device; of the same batch, context and chunks.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    budgets = [part.device_memory_bytes for part in parts]
    known = [budget for budget in budgets if budget is not None]
    drafting = [part.draft_tokens for part in parts if part.shape.full_layers]
    blocks = [part.disk_block_tokens for part in parts if part.shape.full_layers]
    return replace(
        first,
        shape=replace(
            shape,
            weights_bytes=sum(part.shape.weights_bytes for part in parts),
            brought_bytes=sum(part.shape.brought_bytes for part in parts),
        ),
        parts=tuple(parts),
        prompt_plan=None,  # each part has its own
        chunk_tokens=min(part.chunk_tokens for part in parts),
        tile_heads=max(part.tile_heads for part in parts),
        tile_tokens=max(part.tile_tokens for part in parts),
        resident_tokens=min(part.resident_tokens for part in parts),
        device_memory_bytes=sum(known) if len(known) == len(parts) else None,
        staging_bytes=sum(part.staging_bytes for part in parts),
        tail_bytes=sum(part.tail_bytes for part in parts),
        chunk_page_bytes=sum(part.chunk_page_bytes for part in parts),
        unpacked_bytes=sum(part.unpacked_bytes for part in parts),
        packed_bytes=sum(part.packed_bytes for part in parts),
        window_bytes=sum(part.window_bytes for part in parts),
        activation_bytes=sum(part.activation_bytes for part in parts),
        runtime_bytes=sum(part.runtime_bytes for part in parts),
        resident_bytes=sum(part.resident_bytes for part in parts),
        draft_tokens=min(drafting, default=0),
        draft_bytes=sum(part.draft_bytes for part in parts),
        assistant=sum((part.assistant for part in parts), NO_ASSISTANT),
        host_share=max(part.host_share for part in parts),
        verify_host_share=max(part.verify_host_share or 0.0 for part in parts) or None,
        host_share_adapts=any(part.host_share_adapts for part in parts),
        host_unmeasured=any(part.host_unmeasured for part in parts),
        host_left_out=any(part.host_left_out for part in parts),
        disk_block_tokens=max(blocks, default=0) if all(blocks) else 0,
        disk_host_blocks=max(part.disk_host_blocks for part in parts),
        disk_buffers_bytes=sum(part.disk_buffers_bytes for part in parts),
        disk_staging_bytes=sum(part.disk_staging_bytes for part in parts),
        whole_tokens=max(part.whole_tokens for part in parts),
    )
