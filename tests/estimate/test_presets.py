"""The models known by name are those that were published."""

from collections import Counter

import pytest

from headinfer.errors import OptionError
from headinfer.estimate.families import read_config
from headinfer.estimate.parameters import count_parameters
from headinfer.estimate.presets import PRESETS, preset_shape
from headinfer.plan.shape import LayerKind
from shapes import LLAMA_3_8B

KIB = 1024

# Parameters, as their makers and the hub count them, and KV bytes per token of the full layers.
PUBLISHED = {
    "llama-3-8b": (8_030_261_248, 128 * KIB),
    "llama-2-7b": (6_738_415_616, 512 * KIB),
    "mistral-7b": (7_241_732_096, 128 * KIB),
    "qwen2-7b": (7_615_616_512, 56 * KIB),
    "gemma-2-9b": (9_241_705_984, 168 * KIB),
    "llama-3-70b": (70_553_706_496, 320 * KIB),
    "llama-3.1-8b": (8_030_261_248, 128 * KIB),
    "llama-3.2-1b": (1_235_814_400, 32 * KIB),
    "qwen3-8b": (8_190_735_360, 144 * KIB),
    "qwen3-30b-a3b": (30_532_122_624, 96 * KIB),
    "gemma-3-27b": (27_009_346_304, 80 * KIB),  # the text part
    "gpt-oss-20b": (20_914_757_184, 24 * KIB),
    "phi-4": (14_659_507_200, 200 * KIB),
}


def test_all_are_compared() -> None:
    assert PUBLISHED.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_cache(name: str) -> None:
    parameters, kv_bytes = PUBLISHED[name]
    assert count_parameters(*read_config(PRESETS[name], name)).total == parameters
    shape = preset_shape(name)
    assert shape.name == name
    assert shape.kv_bytes(1) == kv_bytes
    if "quantization_config" not in PRESETS[name]:
        buffers_bytes = shape.weights_bytes - 2 * parameters
        assert 0 < buffers_bytes < 4 * KIB


def test_llama_3_8b_is_the_shape_other_tests_use() -> None:
    shape = preset_shape("llama-3-8b")
    assert shape.layers == LLAMA_3_8B.layers
    assert (shape.mlp_width, shape.vocab_size) == (LLAMA_3_8B.mlp_width, LLAMA_3_8B.vocab_size)
    assert shape.max_positions == LLAMA_3_8B.max_positions


def test_gpt_oss_takes_what_its_checkpoint_takes() -> None:
    """What its index says, and two tables of 32 rotary frequencies."""
    assert preset_shape("gpt-oss-20b").weights_bytes == 13_761_264_768 + 2 * 32 * 4


@pytest.mark.parametrize(
    ("name", "full", "window_tokens"),
    [("gemma-2-9b", 21, 4096), ("gemma-3-27b", 10, 1024), ("gpt-oss-20b", 12, 128)],
)
def test_models_with_windows(name: str, full: int, window_tokens: int) -> None:
    layers = preset_shape(name).layers
    assert Counter(layer.kind for layer in layers) == {
        LayerKind.FULL: full,
        LayerKind.SLIDING: len(layers) - full,
    }
    assert layers[0].window_tokens == window_tokens


def test_experts_count_in_the_width_of_the_mlp() -> None:
    assert preset_shape("qwen3-30b-a3b").mlp_width == 8 * 768
    assert preset_shape("gpt-oss-20b").mlp_width == 4 * 2880


def test_another_dtype() -> None:
    shape, wide = preset_shape("phi-4"), preset_shape("phi-4", dtype="float32")
    assert wide.kv_bytes(1) == 2 * shape.kv_bytes(1)
    assert wide.weights_bytes - shape.weights_bytes == 2 * PUBLISHED["phi-4"][0]


def test_an_unknown_name_is_told_with_those_known() -> None:
    with pytest.raises(OptionError, match=r"'llama-9b' is not known; use one of llama-3-8b, .*phi"):
        preset_shape("llama-9b")
