"""Parts of a model that compute faster in some of its calls, beside what is captured."""

import contextlib
from typing import Protocol

import torch

from headinfer.device.base import Device
from headinfer.integration.linears import FewRowLinears
from headinfer.integration.norms import PromptNorms


class FasterParts(Protocol):
    """A set of parts that compute faster, with the results of the model's code but for rounding."""

    def on(self, batch: int, new_tokens: int) -> contextlib.AbstractContextManager[object]:
        """Have them compute faster until the `with` statement ends, if that is for such a call.

        Args:
            batch: rows of the call.
            new_tokens: of each row.
        """


def faster_parts(model: torch.nn.Module, device: Device, *, enabled: bool) -> FasterParts:
    """Return what computes faster on a device: norms of prompts, or on the CPU a step's products.

    Args:
        model: may go while they stay.
        device: where it computes.
        enabled: whether to compute anything so.
    """
    if device.name == "cpu":
        return FewRowLinears(model, device.launch, enabled=enabled)
    return PromptNorms(model, enabled=enabled)
