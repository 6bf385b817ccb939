"""How many parameters a model has, counted from its config, and the bytes they take."""

from dataclasses import dataclass

from headinfer.estimate.families import LINEAR, Experts, Family
from headinfer.estimate.text_config import TextConfig

_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """A count of a model's parameters, apart as quantisation treats them.

    Attributes:
        projections: in the matrices of attention and MLP.
        experts: in the matrices of the experts.
        rest: embeddings, output matrix, norms, biases, routers.
    """

    projections: int = 0
    experts: int = 0
    rest: int = 0

    @property
    def total(self) -> int:
        """All parameters, tied ones once."""
        return self.projections + self.experts + self.rest

    def __add__(self, other: "ParameterCount") -> "ParameterCount":
        """Add the parameters of another part of the model."""
        return ParameterCount(
            projections=self.projections + other.projections,
            experts=self.experts + other.experts,
            rest=self.rest + other.rest,
        )


def count_parameters(family: Family, config: TextConfig) -> ParameterCount:
    """Count the parameters of a causal language model exactly.

    Raises:
        HeadInferError: the config misses a value or has an impossible one.
    """
    hidden, vocab = config.size("hidden_size"), config.size("vocab_size")
    matrices = 1 if config.flag("tie_word_embeddings") else 2
    count = ParameterCount(rest=matrices * vocab * hidden + hidden)
    for layer_idx, layer_type in enumerate(family.layer_types(config)):
        mixer = _linear_attention if layer_type == LINEAR else _attention
        count += mixer(family, config) + _mlp(family, config, layer_idx)
        count += ParameterCount(rest=family.layer_norms * hidden)
    return count


def _attention(family: Family, config: TextConfig) -> ParameterCount:
    hidden, head_dim = config.size("hidden_size"), config.head_dim
    query_heads = config.size("num_attention_heads")
    query_width, kv_width = query_heads * head_dim, config.kv_heads * head_dim
    qkv_width = query_width * (2 if family.output_gate else 1) + 2 * kv_width
    return ParameterCount(
        projections=hidden * (qkv_width + query_width),
        rest=qkv_width * config.flag(family.qkv_bias)
        + hidden * config.flag(family.output_bias)
        + 2 * head_dim * family.head_norms
        + query_heads * family.sinks,
    )


def _linear_attention(_family: Family, config: TextConfig) -> ParameterCount:
    """Count a gated delta net: projections, a convolution, two scalars a head and a norm."""
    hidden, value_dim = config.size("hidden_size"), config.size("linear_value_head_dim")
    value_heads = config.size("linear_num_value_heads")
    key_width = config.size("linear_num_key_heads") * config.size("linear_key_head_dim")
    value_width = value_heads * value_dim
    convolved = (2 * key_width + value_width) * config.size("linear_conv_kernel_dim")
    return ParameterCount(
        projections=hidden * (2 * key_width + 3 * value_width + 2 * value_heads),
        rest=convolved + 2 * value_heads + value_dim,
    )


def _mlp(family: Family, config: TextConfig, layer_idx: int) -> ParameterCount:
    if family.experts and _has_experts(config, layer_idx):
        return _mixture(family.experts, config)
    hidden, width = config.size("hidden_size"), config.size("intermediate_size")
    biases = (2 * width + hidden) * config.flag(family.mlp_bias)
    return ParameterCount(projections=3 * hidden * width, rest=biases)


def _has_experts(config: TextConfig, layer_idx: int) -> bool:
    dense = config.items("mlp_only_layers")
    return layer_idx not in dense and (layer_idx + 1) % config.size("decoder_sparse_step", 1) == 0


def _mixture(experts: Experts, config: TextConfig) -> ParameterCount:
    hidden, width = config.size("hidden_size"), config.size(experts.width)
    num_experts = config.size("num_experts")
    biases = (2 * width + hidden + 1) * num_experts * experts.bias
    count = ParameterCount(
        experts=num_experts * 3 * hidden * width, rest=num_experts * hidden + biases
    )
    if not experts.shared:
        return count
    shared_width = config.size("shared_expert_intermediate_size")
    return count + ParameterCount(projections=3 * hidden * shared_width, rest=hidden)


def buffers_bytes(family: Family, config: TextConfig, itemsize: int) -> int:
    """Return the bytes of a model's buffers: rotary frequencies, kept twice, and a scale.

    Args:
        family: of the model.
        config: of the model.
        itemsize: bytes of one parameter.
    """
    fraction = 1.0
    if family.partial_rotary:
        rope = config.section("rope_parameters") or config.section("rope_scaling")
        given = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        fraction = given if isinstance(given, int | float) else 1.0
    frequencies = (int(config.head_dim * fraction) + 1) // 2
    tables = len(set(family.layer_types(config))) if family.rotary_by_type else 1
    scale_bytes = itemsize * family.scaled_embedding
    return tables * 2 * frequencies * _FLOAT32_BYTES + scale_bytes
