"""What a model must be for its attention to be served exactly; all else is refused by name."""

import ast
import functools
import inspect
import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from headinfer.errors import UnsupportedModelError
from headinfer.integration.calls import CACHE_NAMES
from headinfer.integration.class_source import class_source
from headinfer.plan.shape import LayerKind

HONOURED_KEYWORDS = frozenset(
    {
        "attention_mask",
        "dropout",
        "is_causal",
        "s_aux",
        "scaling",
        "sliding_window",
        "softcap",
    }
)
"""Keywords of an attention call that change its result and that we take into account."""

HARMLESS_KEYWORDS = frozenset(
    {
        "cache_position",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "tokenizer",
        "use_cache",
    }
)
"""Keywords that reach an attention call without meaning anything to it.

`generate` passes the tokenizer on that it is given for its stop strings.
"""

_ATTENTION_CALL = "attention_interface"

_CACHE_VARIABLES = (*CACHE_NAMES, "cache_params")
"""What the code of models calls its cache."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A module's call of the attention registry, read from the source of its `forward`.

    Attributes:
        keywords: what it passes by name.
        hands_over: whether it passes on just the keys and values its cache returned, so that a
            cache may return the new ones alone.
    """

    keywords: frozenset[str]
    hands_over: bool


@functools.cache
def attention_call(module_class: Any) -> AttentionCall | None:
    """Return how a class caches keys and has them attended; None if it does not do both.

    Reading the source finds what we could not serve before the model runs. Keywords a module passes
    on from its caller are checked when the call comes.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(module_class.forward)))
    except (OSError, TypeError):
        return None
    if _ATTENTION_CALL not in source:
        return None
    nodes = list(ast.walk(ast.parse(source)))
    calls = [
        node
        for node in nodes
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == _ATTENTION_CALL
    ]
    assignments = [node for node in nodes if isinstance(node, ast.Assign)]
    updates = [node for node in assignments if _is_cache_update(node.value)]
    if not calls or not updates:
        return None
    keywords = frozenset(key.arg for call in calls for key in call.keywords if key.arg)
    attended = [getattr(argument, "id", None) for argument in calls[0].args[2:4]]
    hands_over = all(_names(update) == attended for update in updates) and not any(
        set(attended) & set(_names(node))
        for node in assignments
        if updates[-1].lineno < node.lineno < calls[0].lineno
    )
    return AttentionCall(keywords, hands_over)


@functools.cache
def _cache_methods(module_class: Any) -> frozenset[str]:
    """Return the methods of its cache that a class calls, or those of its bases beside it do."""
    methods: set[str] = set()
    for base in module_class.__mro__:
        if base.__module__ != module_class.__module__:
            continue
        source = textwrap.dedent(class_source(base, _CACHE_VARIABLES))
        if not any(name in source for name in _CACHE_VARIABLES):
            continue
        methods |= {
            node.func.attr
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and getattr(node.func.value, "id", None) in _CACHE_VARIABLES
        }
    return frozenset(methods)


def _is_cache_update(value: ast.expr) -> bool:
    return isinstance(value, ast.Call) and getattr(value.func, "attr", None) == "update"


def _names(assignment: ast.Assign) -> list[str | None]:
    """Return the names an assignment binds, in order."""
    target = assignment.targets[0]
    elements = target.elts if isinstance(target, ast.Tuple) else [target]
    return [getattr(element, "id", None) for element in elements]


def attention_modules(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the modules of a model that cache keys and attend through the registry."""
    for module in model.modules():
        # Attention to images may be of the same form, without a layer of the cache.
        has_layer = getattr(module, "layer_idx", None) is not None
        if has_layer and _attention_call_of(module) is not None:
            yield module


def _attention_call_of(module: Any) -> AttentionCall | None:
    module_class: Any = type(module)
    return attention_call(module_class)


def layer_index(module: Any) -> int:
    """Return which of a model's layers an attention module is of."""
    return int(module.layer_idx)


def stock_cache(model: PreTrainedModel) -> DynamicCache:
    """Return the cache transformers itself would make for a model."""
    return DynamicCache(config=model.config)


def layer_kind(layer: object) -> LayerKind | None:
    """Return how a layer of transformers' own cache keeps its past; None for kinds not served."""
    kinds: dict[type, LayerKind] = {
        DynamicLayer: LayerKind.FULL,
        DynamicSlidingWindowLayer: LayerKind.SLIDING,
        LinearAttentionLayer: LayerKind.STATE,
    }
    # The layer that keeps nothing came with transformers 5.18 or later.
    if type(layer) is getattr(cache_utils, "DummyLayer", None):
        return LayerKind.STATE
    return kinds.get(type(layer))


def check_supported(model: object) -> None:
    """Refuse a model whose attention cannot be served exactly; where it lies is not looked at.

    Raises:
        UnsupportedModelError: names the reason; nothing was changed.
    """
    check_architecture(model)
    assert isinstance(model, PreTrainedModel), "checked before"
    name = type(model).__name__
    if not model.dtype.is_floating_point:
        raise UnsupportedModelError(f"{name} computes in {model.dtype}, not in a float type")


def check_architecture(model: object) -> None:
    """Refuse a model of a kind that cannot be served exactly, wherever its weights lie.

    Raises:
        UnsupportedModelError: names the reason.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{name} is not a transformers model{_instead(model)}")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only decoders are served")
    if not model.can_generate():
        raise UnsupportedModelError(
            f"{name} is not a causal language model; load it with AutoModelForCausalLM"
        )
    if model.config.get_text_config(decoder=True).output_attentions:
        raise UnsupportedModelError(
            f"the config of {name} has output_attentions=True, which is not served: the attention "
            "weights never exist as a whole"
        )
    _check_layers(model, name)


def _instead(model: object) -> str:
    """Return what to attach in place of what is no model: mostly it has one inside."""
    if isinstance(model, str | os.PathLike):
        return (
            f"; load {str(model)!r} with AutoModelForCausalLM.from_pretrained first, or give its "
            "name to headinfer.generate"
        )
    if hasattr(model, "get_base_model"):
        return "; attach what its get_base_model() returns: the adapters stay in it"
    inside = ("module", "model", "_orig_mod")
    for name in inside:
        if isinstance(getattr(model, name, None), PreTrainedModel):
            return f"; attach its .{name}"
    return "; load one with AutoModelForCausalLM.from_pretrained"


def _check_layers(model: PreTrainedModel, name: str) -> None:
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "kv_sharing_modes", None):
        raise UnsupportedModelError(f"{name} shares keys and values between layers: not served")
    if getattr(config, "attention_chunk_size", None) or "chunked_attention" in (
        getattr(config, "layer_types", None) or ()
    ):
        raise UnsupportedModelError(f"{name} has chunked attention layers: not served")
    if not hasattr(config, "num_hidden_layers"):
        raise UnsupportedModelError(
            f"{name} is made of several models: its attention does not go through transformers' "
            "attention registry as one"
        )
    layers = stock_cache(model).layers
    _check_state(model, layers, name)
    kinds = [layer_kind(layer) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        if kind is None:
            raise UnsupportedModelError(
                f"{name} keeps its past in a {type(layer).__name__}: not served"
            )
    modules = list(attention_modules(model))
    wanted = sum(kind is not LayerKind.STATE for kind in kinds)
    if not wanted:
        raise UnsupportedModelError(f"{name} has no attention layer, so no KV cache to offload")
    if len({layer_index(module) for module in modules}) < wanted:
        raise UnsupportedModelError(
            f"the attention of {name} does not go through transformers' attention registry"
        )
    for module in modules:
        call = _attention_call_of(module)
        assert call is not None, "attention modules have one"
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(f"{type(module).__name__} is not causal: not served")
        if not call.hands_over:
            raise UnsupportedModelError(
                f"{type(module).__name__} caches something else than the keys and values it "
                "attends, such as a compressed form: not served"
            )
        unknown = call.keywords - HONOURED_KEYWORDS - HARMLESS_KEYWORDS
        if unknown:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention, "
                "which is not taken into account here"
            )


def _check_state(model: PreTrainedModel, layers: list[Any], name: str) -> None:
    """Refuse a model that keeps of its past what the cache we give it has no place for."""
    called: set[str] = set()
    for module in model.modules():
        module_class: Any = type(module)
        called |= _cache_methods(module_class)
    foreign = sorted(method for method in called if not hasattr(DynamicCache, method))
    if foreign:
        raise UnsupportedModelError(
            f"{name} keeps its past in a cache of its own kind, with {', '.join(foreign)}: "
            "not served"
        )
    stateful = any(isinstance(layer, LinearAttentionLayer) for layer in layers)
    if stateful and called.isdisjoint({"update_conv_state", "update_recurrent_state"}):
        raise UnsupportedModelError(
            f"{name} keeps a recurrent state in the model itself and not in its cache: not served"
        )


def is_static(cache: Cache) -> bool:
    """Whether a cache hands out memory beyond its tokens, which only a square mask can hide."""
    return bool(cache.is_compileable)
