"""LoRA adapters: what stock transformers and peft give, attached and captured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import headinfer
from captured import SIMULATED, generated, launched
from headinfer.errors import ModelLoadError, OptionError
from headinfer.generation.model import ModelSource, load_config, load_model
from headinfer.integration.model_shape import model_shape
from lora_files import save_lora, stock_with_lora
from saved_models import WORDS, make_tokenizer, save_llama
from tiny_models import random_tokens

PROMPT = " ".join(WORDS[number * 7 % 90] for number in range(70))
WAYS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "tiles": {"device": "simulated", "chunk_tokens": 16, "tile_heads": 1, "tile_tokens": 8},
    "captured": SIMULATED,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_llama(folder, hidden_size=64, intermediate_size=128, eos_token_id=None)


@pytest.fixture(scope="module")
def lora(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lora(llama, tmp_path_factory.mktemp("lora"))


def loaded(llama: Path, lora: Path, dtype: str = "float32") -> Any:
    source = ModelSource(name=str(llama), adapter=str(lora))
    return load_model(source, load_config(source), dtype=dtype, device="cpu")[0]


@pytest.mark.parametrize("way", WAYS)
def test_logits_are_those_of_peft(way: str, llama: Path, lora: Path) -> None:
    model, stock = loaded(llama, lora), stock_with_lora(llama, lora)
    tokens = random_tokens(1, 60)
    expected = generated(stock, tokens, DynamicCache(config=stock.config))
    plain = generated(load_plain(llama), tokens, DynamicCache(config=stock.config))
    with headinfer.attach(model, **WAYS[way]) as offload:
        found = generated(model, tokens, offload.new_cache())
        stats = offload.stats
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.sequences.tolist() != plain.sequences.tolist()
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    if way == "captured":
        assert launched(stats) < stats.decode_steps / 2


def load_plain(llama: Path, dtype: str = "float32") -> Any:
    source = ModelSource(name=str(llama))
    return load_model(source, load_config(source), dtype=dtype, device="cpu")[0]


def test_an_adapter_is_in_the_dtype_of_the_weights_and_counted(llama: Path, lora: Path) -> None:
    model, stock = (
        loaded(llama, lora, "bfloat16"),
        stock_with_lora(llama, lora, dtype=torch.bfloat16),
    )
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    tokens = random_tokens(1, 30)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, stock(tokens).logits)
    adapted = sum(weight.nbytes for name, weight in model.named_parameters() if ".lora_" in name)
    assert adapted > 0
    plain = model_shape(load_plain(llama, "bfloat16")).weights_bytes
    assert model_shape(model).weights_bytes == plain + adapted


def test_generate_takes_an_adapter(llama: Path, lora: Path) -> None:
    parts = headinfer.generate(
        llama, PROMPT, adapter=lora, device="cpu", max_new_tokens=12, do_sample=False
    )
    tokenizer, stock = make_tokenizer(), stock_with_lora(llama, lora)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    ids = stock.generate(**inputs, max_new_tokens=12, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert "".join(part.text for part in parts) == tokenizer.decode(new, skip_special_tokens=True)


def refused(llama: Path, lora: Path, *words: str) -> None:
    with pytest.raises(ModelLoadError) as raised:
        list(headinfer.generate(llama, "w1", adapter=lora))
    line = str(raised.value)
    assert "\n" not in line
    for word in (repr(str(lora)), *words):
        assert word in line


def test_adapters_of_other_models(llama: Path, lora: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    wider = save_llama(tmp_path / "wider", hidden_size=128)
    refused(wider, lora, "does not fit model", "size mismatch", "[4, 64]", "[4, 128]")
    deeper = save_llama(tmp_path / "deeper", num_hidden_layers=3, **sizes)
    refused(deeper, lora, "it lacks 8 weights, such as model.layers.2.")
    flatter = save_llama(tmp_path / "flatter", num_hidden_layers=1, **sizes)
    refused(flatter, lora, "the model has no place for 8 weights, such as model.layers.1.")


def test_what_is_no_lora(llama: Path, lora: Path, tmp_path: Path) -> None:
    refused(llama, tmp_path / "nowhere", "cannot be loaded")
    refused(llama, llama, "cannot be loaded", "adapter_config.json")
    refused(llama, Path("x" * 5000), "cannot be loaded", "give a folder")
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    settings = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    (prompts / "adapter_config.json").write_text(json.dumps(settings))
    refused(llama, prompts, "PROMPT_TUNING", "only LORA is served")
    damaged = save_lora(llama, tmp_path / "damaged")
    file = damaged / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    refused(llama, damaged, "does not fit model")


def test_without_peft_an_error_says_what_to_install(
    llama: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headinfer.generation.adapter.find_spec", lambda _name: None)
    refused(llama, lora, "needs peft: pip install peft")


def test_a_loaded_model_has_its_adapter(llama: Path, lora: Path) -> None:
    with pytest.raises(OptionError, match=r"adapter=.* is for models that are loaded here"):
        headinfer.generate(load_plain(llama), "w1", tokenizer=make_tokenizer(), adapter=str(lora))
