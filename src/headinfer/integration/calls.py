"""A model's forward call: its arguments by name, whichever names this transformers has for them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationMixin

from headinfer.errors import OptionError

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the argument a cache is passed as: since 5.24, and before."""


def cache_name(model: torch.nn.Module) -> str:
    """Return the argument as which a model, and its `generate`, take a cache without a warning."""
    model_class: Any = type(model)
    return _cache_name(model_class)


def cache_argument(model: torch.nn.Module, cache: object) -> dict[str, Any]:
    """Return a cache as the keyword argument of a model's call, or of its `generate`."""
    return {cache_name(model): cache}


@functools.cache
def _cache_name(model_class: Any) -> str:
    for method in (model_class.forward, GenerationMixin.prepare_inputs_for_generation):
        parameters = inspect.signature(method).parameters
        for name in CACHE_NAMES:
            if name in parameters:
                return name
    return CACHE_NAMES[0]


@functools.cache
def _positional_names(model_class: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(model_class.forward).parameters)[1:]


def takes_argument(model: torch.nn.Module, name: str) -> bool:
    """Whether a model's forward names an argument."""
    model_class: Any = type(model)
    return name in _positional_names(model_class)


def named_arguments(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return a forward call's arguments by name, in a dictionary of its own.

    A cache passed under its other name goes by the one of `cache_name`.
    """
    model_class: Any = type(model)
    arguments = dict(zip(_positional_names(model_class), args, strict=False)) | kwargs
    current = cache_name(model)
    for name in CACHE_NAMES:
        if name == current or name not in arguments:
            continue
        if arguments.get(current) is None:
            arguments[current] = arguments.pop(name)
        elif arguments[name] is None:
            del arguments[name]
    return arguments


def last_logits(
    model: torch.nn.Module,
    tokens: torch.Tensor,
    cache: object,
    *,
    call: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """Pass tokens `[1, tokens]` through a model in one call; return the last logits `[vocab]`.

    Args:
        model: in eval mode.
        tokens: after those that the cache holds.
        cache: of the model; updated in place.
        call: another form of the model's call, such as a compiled one.
    """
    kept = {"logits_to_keep": 1} if takes_argument(model, "logits_to_keep") else {}
    output = (call or model)(
        input_ids=tokens, use_cache=True, **kept, **cache_argument(model, cache)
    )
    row: torch.Tensor = output.logits[0, -1]
    return row


def new_shape(arguments: dict[str, Any]) -> tuple[int, int] | None:
    """Return (batch, new tokens) of a forward call; None when it has no tokens.

    Raises:
        OptionError: the tokens have no rows.
    """
    for name in ("input_ids", "inputs_embeds"):
        if arguments.get(name) is not None:
            shape = arguments[name].shape
            if len(shape) < 2:
                raise OptionError(
                    f"{name} has the shape {tuple(shape)}; it must begin with [batch, tokens], as "
                    f"{name}[None] does"
                )
            return int(shape[0]), int(shape[1])
    return None
