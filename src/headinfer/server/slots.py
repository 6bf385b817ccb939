"""What a desk holds, as JSON."""

from collections.abc import Sequence
from typing import Any

from headinfer.server.replies import progress_dict
from headinfer.serving.slots import SlotState


def slot_dicts(slots: Sequence[SlotState]) -> list[dict[str, Any]]:
    """Return slots as objects; what they hold in bytes, and no text.

    Args:
        slots: of a desk.
    """
    return [
        {
            "id": slot.id,
            "state": slot.state,
            "is_processing": slot.state == "running",
            "queue_position": slot.position,
            "tokens": slot.tokens,
            "gpu_bytes": slot.device_bytes,
            "cpu_bytes": slot.host_bytes,
            "disk_bytes": slot.disk_bytes,
            "prompt_progress": None if slot.progress is None else progress_dict(slot.progress),
            "completion_tokens": slot.completion_tokens,
        }
        for slot in slots
    ]
