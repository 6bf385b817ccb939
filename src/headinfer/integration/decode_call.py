"""Calls of a model for a few new tokens in each row, told apart by what a capture can serve."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from headinfer.device.base import CaptureError
from headinfer.engine.ready import Form
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.calls import cache_name, takes_argument
from headinfer.integration.layer import OffloadedLayer


@dataclass(frozen=True, slots=True)
class DecodeCall:
    """A call of a model for one new token in each row, or a few.

    Attributes:
        past_tokens: tokens in the cache before it.
        new_tokens: of each row.
        tensors: arguments whose contents change from call to call.
        others: arguments that do not.
        kind: equal for calls that are alike but for contents.
        form: in which it is captured.
    """

    past_tokens: int
    new_tokens: int
    tensors: dict[str, torch.Tensor]
    others: dict[str, Any]
    kind: Hashable
    form: Form = Form.ONE_LAUNCH

    @property
    def key(self) -> Hashable:
        """Equal for calls that one capture serves."""
        return self.kind, self.form

    @property
    def several(self) -> bool:
        """Whether there are several new tokens in each row."""
        return self.new_tokens > 1

    def in_form(self, form: Form) -> "DecodeCall":
        """Return the call in another form."""
        return replace(self, form=form)


def verifies(arguments: Mapping[str, Any]) -> bool:
    """Whether a call of a few tokens behind others may check drafts.

    Who checks drafts wants all their logits. A short prompt wants the last alone.

    Args:
        arguments: of the call, by name.
    """
    kept = arguments.get("logits_to_keep")
    return not (isinstance(kept, int) and kept == 1)


class DecodeCalls:
    """A reader of a model's calls.

    Args:
        model: may go while this stays.

    Attributes:
        cache_name: what the model takes a cache as.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.cache_name = cache_name(model)
        self._takes_positions = takes_argument(model, "position_ids")

    def read(
        self, cache: OffloadedCache, arguments: dict[str, Any], new_tokens: int
    ) -> DecodeCall | None:
        """Return a call of a few new tokens in the form that is captured.

        None for the first tokens, and for those of which some passed as a chunk.

        Args:
            cache: the call's.
            arguments: of the call, by name.
            new_tokens: of each row.

        Raises:
            CaptureError: it is none that can be captured.
        """
        past_tokens = cache.get_seq_length()
        if not past_tokens:
            return None
        if not all(isinstance(layer, OffloadedLayer) for layer in cache.layers):
            raise CaptureError("layers keep states of transformers' own")
        engine = cache.state.engine
        if engine is not None and engine.reads_disk:  # which takes longer than to launch a step
            raise CaptureError("tokens are read from the disk, twice where captures are compared")
        tensors: dict[str, torch.Tensor] = {}
        others: dict[str, Any] = {}
        for name, value in arguments.items():
            if name == self.cache_name:
                continue
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif value is None or isinstance(value, (bool, int, float, str)):
                others[name] = value
            else:
                raise CaptureError(f"{name} is a {type(value).__name__}")
        mask = tensors.pop("attention_mask", None)
        if mask is not None:
            if mask.ndim != 2 or mask.shape[1] != past_tokens + new_tokens:
                raise CaptureError("their mask has not one column for each token")
            if not mask.all():
                raise CaptureError("some of their tokens are padding")
            others["attention_mask"] = None  # nothing is padding
        tokens = next(tensors[name] for name in ("input_ids", "inputs_embeds") if name in tensors)
        if tokens.shape[1] != new_tokens:
            return None
        if self._takes_positions and "position_ids" not in tensors:
            others.pop("position_ids", None)
            positions = torch.arange(past_tokens, past_tokens + new_tokens, device=tokens.device)
            tensors["position_ids"] = positions[None]
        if any(tensor.device != tokens.device for tensor in tensors.values()):
            raise CaptureError("their arguments are on several devices")
        kind = cache.state.drafting, _kind(tokens.device.type, tensors, others)
        return DecodeCall(past_tokens, new_tokens, tensors, others, kind)


def _kind(device_type: str, tensors: dict[str, torch.Tensor], others: dict[str, Any]) -> Hashable:
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    return (
        frozenset((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()),
        frozenset((name, type(value), value) for name, value in others.items()),
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast),
    )
