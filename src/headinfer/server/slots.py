"""What a desk holds, as JSON, and saving and restoring it as llama-server has them."""

from collections.abc import Sequence
from typing import Any

from headinfer.saved.messages import Messages, are_messages
from headinfer.server.bodies import Message, SlotBody
from headinfer.server.messages import chat_messages
from headinfer.server.problems import ProblemError
from headinfer.server.replies import progress_dict
from headinfer.serving.desk import Desk
from headinfer.serving.sessions import NamedSession
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


def save_slot(desk: Desk, slot_id: str, body: SlotBody) -> dict[str, Any]:
    """Save a slot as a session; return what llama-server tells of it.

    Args:
        desk: of the model.
        slot_id: of the slot.
        body: with the session's name, and what was said.

    Raises:
        HeadInferError: it cannot be saved.
        ProblemError: the messages are no conversation.
    """
    saved = desk.save_slot(slot_id, body.filename, _conversation(body.messages))
    return {
        "id_slot": slot_id,
        "filename": body.filename,
        "n_saved": saved.tokens,
        "n_written": saved.num_bytes,
        "timings": {"save_ms": round(1000 * saved.seconds, 1)},
    }


def restore_slot(desk: Desk, body: SlotBody) -> dict[str, Any]:
    """Have a session as a slot; return what llama-server tells of it, and what was said.

    A slot that is kept and has all of its tokens stands for it.

    Args:
        desk: of the model.
        body: with the session's name.

    Raises:
        HeadInferError: it cannot be restored.
    """
    restored = desk.restore_slot(body.filename)
    said = restored.messages
    system = [] if said.system is None else [{"role": "system", "content": said.system}]
    return {
        "id_slot": restored.slot_id,
        "filename": body.filename,
        "n_restored": restored.tokens,
        "n_read": restored.num_bytes,
        "timings": {"restore_ms": round(1000 * restored.seconds, 1)},
        "messages": [*system, *said.said],
    }


def _conversation(given: Sequence[Message] | None) -> Messages | None:
    """Return what was said, as the file beside a session has it."""
    if given is None:
        return None
    taken = [{name: part[name] for name in ("role", "content")} for part in chat_messages(given)]
    system = taken.pop(0)["content"] if taken and taken[0]["role"] == "system" else None
    if not are_messages(taken) or not _is_text(
        [system or "", *(part["content"] for part in taken)]
    ):
        raise ProblemError(
            400,
            "messages to be saved are a user's and answers in turn, after what the system says",
            param="messages",
        )
    return Messages(system=system, said=taken)


def _is_text(texts: Sequence[str]) -> bool:
    """Whether a file can hold texts: half a character cannot be written."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def session_list(sessions: Sequence[NamedSession] | None) -> dict[str, Any]:
    """Return sessions as an object, and whether any can be saved.

    Args:
        sessions: of a desk; None without a folder.
    """
    listed = [
        {
            "filename": each.name,
            "tokens": each.tokens,
            "disk_bytes": each.num_bytes,
            "saved_at": round(each.changed_s),
            "conversation": each.conversation,
        }
        for each in sessions or ()
    ]
    return {"object": "list", "enabled": sessions is not None, "data": listed}
