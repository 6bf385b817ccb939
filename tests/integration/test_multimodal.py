"""Models that also see: text alone in chunks, a prompt with an image at once, as in stock."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

import headinfer
from headinfer.errors import UnsupportedModelError
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens

PROMPT = 60
CHUNK = 13
IMAGE = 96
"""The token an image's features take the place of."""

_TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_PATCHES: dict[str, Any] = {
    "depth": 1,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
_MARKS = {"video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93}

Given = dict[str, torch.Tensor]


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def with_image(num_tokens: int) -> torch.Tensor:
    """Tokens of a prompt with those of one image in it."""
    tokens = random_tokens(1, PROMPT) % 90
    tokens[:, 20 : 20 + num_tokens] = IMAGE
    return tokens


def llava() -> tuple[PreTrainedModel, Given]:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    return model, {"input_ids": with_image(4), "pixel_values": pixels(1, 3, 28, 28)}


def gemma3() -> tuple[PreTrainedModel, Given]:
    text = transformers.Gemma3TextConfig(
        **_TEXT,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**_VISION),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    )
    tokens = with_image(4)
    types = (tokens == IMAGE).long()
    given = {"input_ids": tokens, "pixel_values": pixels(1, 3, 28, 28), "token_type_ids": types}
    return transformers.Gemma3ForConditionalGeneration(config), given


def qwen(family: str, vision: dict[str, Any]) -> tuple[PreTrainedModel, Given]:
    config = getattr(transformers, f"{family}Config")(
        text_config={**_TEXT, "head_dim": 16, "rope_parameters": _SECTIONS},
        vision_config={**_PATCHES, **vision},
        image_token_id=IMAGE,
        **_MARKS,
    )
    tokens = with_image(4)
    tokens[:, 19], tokens[:, 24] = 94, 93
    return getattr(transformers, f"{family}ForConditionalGeneration")(config), {
        "input_ids": tokens,
        "pixel_values": pixels(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (tokens == IMAGE).long(),
    }


def qwen2() -> tuple[PreTrainedModel, Given]:
    return qwen("Qwen2VL", {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 1})


def qwen3() -> tuple[PreTrainedModel, Given]:
    sizes = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 32}
    marks = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return qwen("Qwen3VL", sizes | marks)


MODELS = [llava, gemma3, qwen2, qwen3]
Maker = Callable[[], tuple[PreTrainedModel, Given]]


def build(make: Maker) -> tuple[PreTrainedModel, Given]:
    """Return a tiny model in which every layer counts, and a prompt with an image."""
    torch.manual_seed(0)
    model, given = make()
    model.eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.0)
    model.generation_config.eos_token_id = None
    return model, given


def check(
    model: PreTrainedModel, run: Callable[[Any], torch.Tensor], *, widest: int, **options: Any
) -> None:
    """Expect a run with our cache to give what stock gives, in passes of at most `widest`."""
    widths: list[int] = []
    stock = run(DynamicCache(config=model.config))
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, inputs, _output: widths.append(inputs[0].shape[-1])
    )
    try:
        with headinfer.attach(model, **{"chunk_tokens": CHUNK, **options}) as offload:
            ours = run(offload.new_cache())
    finally:
        handle.remove()
    torch.testing.assert_close(ours, stock)
    assert max(widths) == widest


def answer(model: PreTrainedModel, cache: Any, given: Given) -> torch.Tensor:
    mask = {"attention_mask": torch.ones_like(given["input_ids"])}
    options = {**mask, **given, **cache_argument(model, cache)}
    return model.generate(**options, max_new_tokens=5, do_sample=False, pad_token_id=0)


@pytest.mark.covering
@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("make", MODELS)
def test_text_alone_passes_in_chunks(
    make: Maker, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, with_types = build(make)
    tokens = random_tokens(2, PROMPT)
    mask = torch.ones_like(tokens)
    mask[0, : CHUNK + 4] = 0
    given = {"input_ids": tokens, "attention_mask": mask}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in with_types:  # as processors give them for text
            given[name] = torch.zeros_like(tokens)
    check(model, lambda cache: answer(model, cache, given), widest=CHUNK, device=device)
    assert not [record for record in caplog.records if record.name.startswith("headinfer")]


@pytest.mark.parametrize("make", [llava, qwen2, qwen3])
def test_a_prompt_with_an_image_passes_at_once_and_is_said(
    make: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    model, given = build(make)
    following = random_tokens(1, PROMPT - 2, seed=4)

    def converse(cache: Any) -> torch.Tensor:
        tokens = torch.cat((answer(model, cache, given), following), dim=1)
        return answer(model, cache, {"input_ids": tokens})

    check(model, converse, widest=PROMPT)  # and the next turn, of text, in chunks
    said = [record.getMessage() for record in caplog.records if "at once" in record.getMessage()]
    assert len(said) == 1
    assert "it was given" in said[0]


def test_images_whose_tokens_see_each_other_are_refused() -> None:
    model, given = build(gemma3)
    with (
        headinfer.attach(model, chunk_tokens=CHUNK) as offload,
        pytest.raises(UnsupportedModelError, match="more than causal"),
    ):
        answer(model, offload.new_cache(), given)


@pytest.mark.covering
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", [qwen2, qwen3])
def test_positions_of_an_earlier_image_do_not_reach_chunks(make: Maker, masked: bool) -> None:
    model, given = build(make)
    tokens = random_tokens(1, PROMPT)
    arguments = {"attention_mask": torch.ones_like(tokens)} if masked else {}
    answer(model, None, given)  # leaves its shift of positions in the model

    def run(cache: Any) -> torch.Tensor:
        return model(tokens, **cache_argument(model, cache), **arguments).logits

    check(model, run, widest=CHUNK)


def test_a_prefix_that_sees_all_of_itself_is_refused_before_the_model_is_touched() -> None:
    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**_TEXT, head_dim=16),
        vision_config=transformers.SiglipVisionConfig(**_VISION),
        image_token_index=IMAGE,
        projection_dim=64,
    )
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModelError, match="is not causal"):
        headinfer.attach(model)
