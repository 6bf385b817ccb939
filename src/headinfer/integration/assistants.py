"""Assistants that draft beside an attached model: what they take, for the plans of its caches."""

import contextlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel

from headinfer.errors import UnsupportedModelError
from headinfer.integration.attachment import owner_of
from headinfer.integration.model_shape import model_shape
from headinfer.integration.stored_weights import bytes_by_device
from headinfer.integration.support import check_supported
from headinfer.plan.assistant import NO_ASSISTANT, AssistantBytes, working_bytes
from headinfer.plan.plan import Plan


@runtime_checkable
class _Planned(Protocol):
    """An owner of an attached assistant, which has a plan of its own."""

    plan: Plan


class Assistants:
    """A list of the assistants of the answers that are under way.

    Several answers may have the same one. Its weights count once then, and its caches for each.
    """

    def __init__(self) -> None:
        self._working: list[tuple[PreTrainedModel, int]] = []

    @contextlib.contextmanager
    def during(self, assistant: PreTrainedModel | None, tokens: int) -> Iterator[None]:
        """Have an assistant count in the plans that are made in the `with` statement.

        Args:
            assistant: None for none.
            tokens: of prompt and answer; 0 where it drafts nothing, and so needs no cache.
        """
        if assistant is None:
            yield
            return
        entry = assistant, _working_bytes(assistant, tokens) if tokens else 0
        self._working.append(entry)
        try:
            yield
        finally:
            self._working.remove(entry)

    def on(self, device: torch.device) -> AssistantBytes:
        """Return what they take of a device."""
        taken, seen = NO_ASSISTANT, set()
        for assistant, size in list(self._working):
            weights = 0
            if id(assistant) not in seen:
                weights = bytes_by_device(assistant).get(device, 0)
            seen.add(id(assistant))
            size = size if assistant.device == device else 0
            taken += AssistantBytes(weights_bytes=weights, working_bytes=size)
        return taken


def _working_bytes(assistant: PreTrainedModel, tokens: int) -> int:
    """Return what an assistant takes beside its weights; nothing where its kind is not known."""
    owner = owner_of(assistant)
    if isinstance(owner, _Planned):
        return owner.plan.kv_device_bytes + owner.plan.activation_bytes
    try:
        check_supported(assistant)
    except UnsupportedModelError:
        return 0
    device = "cuda" if assistant.device.type == "cuda" else "cpu"
    return working_bytes(model_shape(assistant), tokens, device=device)
