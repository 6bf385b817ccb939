"""Every way to name a model leads to its shape, and every mistake to one line."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from headinfer.cli.shapes import shape_of
from headinfer.errors import HeadInferError, ModelLoadError, UnsupportedModelError
from headinfer.estimate.presets import PRESETS, preset_shape


@pytest.fixture(scope="module")
def loaded_shape(llama):
    from transformers import AutoModelForCausalLM

    from headinfer.integration.model_shape import model_shape

    return model_shape(AutoModelForCausalLM.from_pretrained(llama))


def test_a_preset() -> None:
    assert shape_of("qwen3-8b") == preset_shape("qwen3-8b")
    assert shape_of("qwen3-8b", dtype="float32") == preset_shape("qwen3-8b", dtype="float32")


def test_a_folder_and_its_config(llama, loaded_shape) -> None:
    for name in (str(llama), str(llama / "config.json")):
        assert shape_of(name) == replace(loaded_shape, name=name)
    assert shape_of(str(llama), dtype="bfloat16").kv_itemsize == 2


def test_a_folder_called_as_a_preset(llama, loaded_shape, tmp_path, monkeypatch) -> None:
    (tmp_path / "phi-4").symlink_to(llama)
    monkeypatch.chdir(tmp_path)
    assert shape_of("phi-4") == preset_shape("phi-4")
    assert shape_of("./phi-4") == replace(loaded_shape, name="./phi-4")


def test_the_demo_model() -> None:
    from headinfer.demo.layout import HEAD_DIM, KV_HEADS, LAYERS, MAX_TOKENS

    shape = shape_of("demo")
    assert shape.name == "demo"
    assert shape.max_positions == MAX_TOKENS
    assert shape.kv_bytes(1) == LAYERS * KV_HEADS * 2 * HEAD_DIM * 4


def test_a_model_of_the_hub(monkeypatch) -> None:
    from transformers import LlamaConfig

    def load(source):
        assert (source.name, source.local_files_only) == ("org/model", True)
        return LlamaConfig(**PRESETS["llama-3.2-1b"])

    monkeypatch.setattr("headinfer.cli.shapes.load_config", load)
    shape = shape_of("org/model", local_files_only=True)
    assert shape == replace(preset_shape("llama-3.2-1b"), name="org/model")


def test_neither_torch_nor_transformers_is_imported(llama) -> None:
    program = f"""
import sys
from headinfer.cli.shapes import shape_of

shape_of("llama-3-8b")
shape_of({str(llama)!r})
shape_of({str(llama / "config.json")!r})
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def write(folder, values) -> str:
    file = folder / "config.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values))
    return str(file)


@pytest.mark.parametrize("tied", [True, False])
def test_a_family_that_the_table_lacks(tied, tmp_path) -> None:
    from transformers import Olmo2Config, Olmo2ForCausalLM

    from headinfer.integration.model_shape import model_shape

    config = Olmo2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    name = write(tmp_path, config.to_dict() | {"dtype": "float32"})
    assert shape_of(name) == replace(model_shape(Olmo2ForCausalLM(config)), name=name)
    assert shape_of(name, dtype="float16").kv_itemsize == 2
    whole = shape_of(name)
    packed = {"quantization_config": {"quant_method": "compressed-tensors", "format": "int"}}
    name = write(tmp_path, config.to_dict() | {"dtype": "float32"} | packed)
    assert shape_of(name).weights_bytes == whole.weights_bytes  # they are unpacked when loaded


MISTAKES = {
    "not JSON": ('{"model_type": "llama",', ModelLoadError, "is not JSON"),
    "not text": ("\0" * 9, ModelLoadError, "is not JSON"),
    "a list": ("[1, 2]", ModelLoadError, "no mapping"),
    "no config": ("{}", ModelLoadError, "no model_type"),
    "missing key": ({"model_type": "llama"}, ModelLoadError, "has no"),
    "unknown type": ({"model_type": "no-such"}, UnsupportedModelError, "'no-such'", "llama"),
    "unknown and quantised": (
        {"model_type": "olmo2", "quantization_config": {"quant_method": "awq"}},
        UnsupportedModelError,
        "'olmo2'",
    ),
    "not served": ({"model_type": "deepseek_v3", "num_hidden_layers": 2}, UnsupportedModelError),
    "encoder": ({"model_type": "bert"}, ModelLoadError, "encoder"),
    "encoder and decoder": ({"model_type": "t5"}, ModelLoadError, "encoder-decoder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_configs(name, tmp_path) -> None:
    values, error, *words = MISTAKES[name]
    with pytest.raises(error) as raised:
        shape_of(write(tmp_path, values))
    assert isinstance(raised.value, HeadInferError)
    assert "\n" not in str(raised.value)
    assert all(word in str(raised.value) for word in words)


def test_no_model_there(tmp_path) -> None:
    with pytest.raises(ModelLoadError, match="holds no model"):
        shape_of(str(tmp_path))
    with pytest.raises(ModelLoadError, match="No such file"):
        shape_of(str(tmp_path / "config.json"))
    with pytest.raises(ModelLoadError, match="neither a folder nor"):
        shape_of(str(tmp_path / "missing"))
    (tmp_path / "model.bin").write_bytes(b"PK")
    with pytest.raises(ModelLoadError, match=r"give a \.json file"):
        shape_of(str(tmp_path / "model.bin"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match="GGUF"):
        shape_of(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["my-model", "org/no-such-model"])
def test_the_hub_cannot_be_reached(name: str) -> None:
    with pytest.raises(ModelLoadError) as raised:
        shape_of(name)
    line = str(raised.value)
    assert "\n" not in line
    assert name in line
    assert "need no network: llama-3-8b, " in line
