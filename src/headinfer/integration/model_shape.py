"""The shape of a model in hand, as plans see it."""

from typing import Any

from transformers import PreTrainedModel

from headinfer.integration.stored_weights import tensor_bytes, weights_bytes
from headinfer.integration.support import (
    attention_modules,
    layer_index,
    layer_kind,
    stock_cache,
)
from headinfer.plan.memory import fused_mlp_elements
from headinfer.plan.shape import LayerKind, LayerShape, ModelShape


def model_shape(model: PreTrainedModel) -> ModelShape:
    """Return a supported model's shape, read from its attention modules and its config."""
    config = model.config.get_text_config(decoder=True)
    modules = {layer_index(module): module for module in attention_modules(model)}
    layers = []
    for layer_idx, cache_layer in enumerate(stock_cache(model).layers):
        kind = layer_kind(cache_layer)
        assert kind is not None, "checked before"
        layers.append(_layer_shape(kind, cache_layer, config, modules.get(layer_idx)))
    intermediate = int(getattr(config, "intermediate_size", 0) or 4 * config.hidden_size)
    experts = getattr(config, "num_experts_per_tok", None)
    if experts:
        width = getattr(config, "moe_intermediate_size", 0) or intermediate
        expert_width = max(width) if isinstance(width, list | tuple) else int(width)
        shared = int(getattr(config, "shared_expert_intermediate_size", 0) or 0)
        intermediate = max(intermediate, int(experts) * expert_width + shared)
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    output = getattr(model.get_output_embeddings(), "weight", None)
    return ModelShape(
        name=type(model).__name__,
        layers=tuple(layers),
        query_heads=int(config.num_attention_heads),
        hidden_size=int(config.hidden_size),
        mlp_width=intermediate,
        vocab_size=int(config.vocab_size),
        weights_bytes=weights_bytes(model),
        kv_itemsize=model.dtype.itemsize,
        max_positions=int(getattr(config, "max_position_embeddings", 0) or 0),
        mlp_peak_elements=_mlp_peak_elements(model, config, intermediate),
        embedding_bytes=0 if embedding is None else tensor_bytes(embedding),
        output_bytes=0 if output is None or output is embedding else tensor_bytes(output),
        splits_heads=splits_heads(config),
    )


def splits_heads(config: Any) -> bool:
    """Whether transformers' tensor parallelism gives each process some of a model's heads."""
    plan = getattr(config, "base_model_tp_plan", None) or {}
    return any(key.endswith("k_proj") and style == "colwise" for key, style in plan.items())


def _mlp_peak_elements(model: PreTrainedModel, config: Any, mlp_width: int) -> int:
    """Elements a token occupies at the peak of one MLP; 0 where gate and up are apart."""
    fused = [module for module in model.modules() if hasattr(module, "gate_up_proj")]
    if not fused:
        return 0
    gathered = int(getattr(config, "num_experts_per_tok", 0) or 0) * int(config.hidden_size)
    biased = any(hasattr(module, "gate_up_proj_bias") for module in fused)
    return fused_mlp_elements(mlp_width, gathered=gathered, biased=biased)


def _layer_shape(kind: LayerKind, cache_layer: object, config: Any, module: Any) -> LayerShape:
    if kind is LayerKind.STATE:
        return LayerShape(kind=kind)
    query_heads = int(getattr(config, "num_attention_heads", 1))
    key_dim = int(getattr(module, "qk_head_dim", 0) or getattr(module, "head_dim", 0)) or (
        int(getattr(config, "hidden_size", 0)) // query_heads
    )
    return LayerShape(
        kind=kind,
        kv_heads=query_heads // int(getattr(module, "num_key_value_groups", 1)),
        key_dim=key_dim,
        value_dim=int(getattr(module, "v_head_dim", 0)) or key_dim,
        window_tokens=int(getattr(cache_layer, "sliding_window", 0)),
    )
