"""Whether several ranks can share a model, by its config and before its weights are read."""

from typing import Any

from headinfer.errors import UnsupportedModelError
from headinfer.integration.model_shape import splits_heads
from headinfer.integration.shards import refusal


def check_splittable(name: str, config: Any, ranks: int) -> None:
    """Refuse a model that transformers does not split, or not over so many ranks.

    Args:
        name: of the model, for messages.
        config: transformers' own.
        ranks: processes that are to share it.

    Raises:
        UnsupportedModelError: says why.
    """
    text = config.get_text_config(decoder=True)
    plan = getattr(text, "base_model_tp_plan", None)
    if not plan:
        raise UnsupportedModelError(
            f"model {name!r} ({config.model_type}) has no tp_plan in transformers, by which it "
            "would be split; run it in one process"
        )
    heads = int(getattr(text, "num_key_value_heads", 0) or getattr(text, "num_attention_heads", 0))
    if splits_heads(text) and heads % ranks:
        raise UnsupportedModelError(refusal(f"model {name!r}", heads, ranks))
