"""The positions of a chunk, where a model would not derive them as it does for a whole call.

Most models count on from the tokens in their cache, and need none of this.
"""

import ast
import functools
import inspect
import textwrap
from typing import Any

import torch
from transformers import PreTrainedModel

from headinfer.integration.calls import CACHE_NAMES, new_shape
from headinfer.integration.class_source import class_source

_COUNTING = "create_position_ids_from_input_ids"
"""What transformers calls the function that does."""


def positions_to_give(
    model: torch.nn.Module, arguments: dict[str, Any], past_tokens: int
) -> torch.Tensor | None:
    """Return the `position_ids` `[batch, new tokens]` to give to chunks; None to leave them.

    Args:
        model: the attached model.
        arguments: of the whole call, by name.
        past_tokens: tokens in the cache before the call.
    """
    if arguments.get("position_ids") is not None:
        return None
    given = arguments.get("input_ids")
    # A call that begins with tokens, and not with their embeddings, is not shifted as a whole.
    begins = past_tokens == 0 and given is not None
    if not _restarts(model) and not (begins and _shifts(model)):
        return None
    shape = new_shape(arguments)
    assert shape is not None
    device = (arguments["inputs_embeds"] if given is None else given).device
    return torch.arange(shape[1], device=device).expand(shape)


def positions_unknown(model: torch.nn.Module, arguments: dict[str, Any], past_tokens: int) -> bool:
    """Whether a model may derive positions from a call's padding, or from what it saw before."""
    mask = arguments.get("attention_mask")
    if arguments.get("position_ids") is not None:
        return False
    if _counts_tokens(model):
        return True
    if mask is None or not _shifts(model):
        return False
    begins = past_tokens == 0 and arguments.get("input_ids") is not None
    return not begins or bool((mask == 0).any())


def _shifts(model: torch.nn.Module) -> bool:
    """Whether a model adds what the images of an earlier call left as `rope_deltas`.

    It does so for any call on a filled cache, so for all chunks but the first of a new prompt.
    """
    return any(hasattr(module, "rope_deltas") for module in model.modules())


def _counts_tokens(model: torch.nn.Module) -> bool:
    """Whether a model counts the tokens of each call that are no padding, as RoBERTa does.

    It adds what its cache holds, padding included: chunks would count on from another number.
    """
    classes: set[Any] = {type(module) for module in model.modules()}
    return any(_counts_no_padding(module_class) for module_class in classes)


@functools.cache
def _counts_no_padding(module_class: Any) -> bool:
    return _COUNTING in class_source(module_class, [_COUNTING])


def _restarts(model: torch.nn.Module) -> bool:
    """Whether a model begins at position 0 in each call, whatever its cache holds."""
    classes: set[Any] = {
        type(module) for module in model.modules() if isinstance(module, PreTrainedModel)
    }
    return any(_counts_from_zero(module_class) for module_class in classes)


@functools.cache
def _counts_from_zero(module_class: Any) -> bool:
    """Whether the forward of a class with a cache sets `position_ids` without a look at it."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(module_class.forward)))
    except (OSError, TypeError):
        return False
    if "position_ids = torch.arange(" not in source or "get_seq_length" in source:
        return False
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    names = {argument.arg for argument in function.args.args}
    return "position_ids" in names and not names.isdisjoint(CACHE_NAMES)
