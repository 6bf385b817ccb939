"""The demo model with a KV head for each query head, which computes the same.

In the demo model each KV head of layer 0 serves a query head that looks near and one that looks
far. So every KV head needs all tokens. Ungrouped, KV heads 0 and 2 of layer 0 look near alone. All
others find what an answer is made of, wherever it stands.
"""

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

NEAR = ((0, 0), (0, 2))
"""Layer and KV head of those that look near."""


def ungroup(model: "LlamaForCausalLM") -> "LlamaForCausalLM":
    """Return a copy of a Llama in which no query heads share a KV head."""
    import torch
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(model.config)
    group = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads = config.num_attention_heads
    weights = {
        name: value.unflatten(0, (-1, model.model.layers[0].self_attn.head_dim))
        .repeat_interleave(group, 0)
        .flatten(0, 1)
        if name.endswith(("k_proj.weight", "v_proj.weight"))
        else value
        for name, value in model.state_dict().items()
    }
    with torch.no_grad():
        ungrouped: LlamaForCausalLM = LlamaForCausalLM(config).to(model.dtype).eval()
        ungrouped.load_state_dict(weights)
    return ungrouped
