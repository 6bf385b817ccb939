"""Weights that are quantised as they are loaded: what stock gives, and what they take."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

import headinfer
from captured import SIMULATED, generated, launched
from headinfer.cli.shapes import shape_of
from headinfer.errors import ModelLoadError, OptionError
from headinfer.generation.model import ModelSource, load_config, load_model
from headinfer.generation.quantised import LOAD_IN
from headinfer.integration.model_shape import model_shape
from saved_models import make_tokenizer, save_llama
from tiny_models import VOCAB, random_tokens, tiny_model

needs_library = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="weights are quantised with bitsandbytes",
)
SIZES = {"hidden_size": 128, "intermediate_size": 256}
STOCK: dict[str, dict[str, Any]] = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8bit": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
WAYS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "tiles": {"device": "simulated", "chunk_tokens": 16, "tile_heads": 1, "tile_tokens": 8},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), **SIZES, eos_token_id=None)


def loaded(folder: Path, load_in: str | None, dtype: str = "float32") -> Any:
    source = ModelSource(name=str(folder), load_in=load_in)
    return load_model(source, load_config(source), dtype=dtype, device="cpu")[0]


@pytest.mark.covering
@needs_library
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("load_in", LOAD_IN)
def test_logits_are_those_of_stock_in_the_same_form(load_in: str, way: str, llama: Path) -> None:
    model, tokens = loaded(llama, load_in), random_tokens(1, 60)
    stock = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=BitsAndBytesConfig(**STOCK[load_in])
    ).eval()
    expected = generated(stock, tokens, DynamicCache(config=stock.config))
    plain = generated(loaded(llama, None), tokens, DynamicCache(config=stock.config))
    with headinfer.attach(model, **WAYS[way]) as offload:
        found = generated(model, tokens, offload.new_cache())
    assert found.sequences.tolist() == expected.sequences.tolist()
    ours, theirs, unquantised = map(first_logits, (found, expected, plain))
    # On some CPUs the products are in bfloat16 inside, which makes last bits of attention more.
    assert distance(ours, theirs) < 0.02 * distance(theirs, unquantised)


def first_logits(output: Any) -> torch.Tensor:
    logits: torch.Tensor = output.logits[0]
    return logits


def distance(these: torch.Tensor, those: torch.Tensor) -> float:
    return (these - those).abs().max().item()


@needs_library
def test_a_checkpoint_whose_results_follow_the_pass_takes_no_chunks(
    llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=settings).eval()
    tokens = random_tokens(1, 60)
    expected = generated(model, tokens, DynamicCache(config=model.config), max_new_tokens=1)
    caplog.clear()
    with headinfer.attach(model, device="cpu", chunk_tokens=16) as offload:
        found = generated(model, tokens, offload.new_cache(), max_new_tokens=1)
    assert distance(*map(first_logits, (found, expected))) < 1e-3
    told = [record.getMessage() for record in caplog.records if "headinfer" in record.name]
    assert len(told) == 1
    assert "takes 60 tokens at once" in told[0]
    assert "llm_int8_threshold=0" in told[0]


@needs_library
def test_steps_in_4_bits_are_captured(llama: Path) -> None:
    model, tokens = loaded(llama, "4bit"), random_tokens(1, 60)
    expected = generated(model, tokens, DynamicCache(config=model.config))
    with headinfer.attach(model, **SIMULATED) as offload:
        found = generated(model, tokens, offload.new_cache())
        assert launched(offload.stats) < offload.stats.decode_steps / 2
    assert found.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.covering
@needs_library
@pytest.mark.parametrize("load_in", LOAD_IN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_take_what_a_plan_says(load_in: str, dtype: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024}
    folder = save_llama(tmp_path / "larger", **sizes)
    model = loaded(folder, load_in, dtype)
    planned = shape_of(str(folder), dtype=dtype, quantised=load_in)
    plain = shape_of(str(folder), dtype=dtype)
    with headinfer.attach(model, device="cpu") as offload:
        found = offload.plan.shape.weights_bytes
    assert found == pytest.approx(planned.weights_bytes, rel=0.01)
    assert found < 0.6 * plain.weights_bytes
    assert model.dtype == getattr(torch, dtype)


@needs_library
@pytest.mark.parametrize("load_in", LOAD_IN)
def test_experts_stay_as_they_are(load_in: str, tmp_path: Path) -> None:
    tiny_model("qwen3-moe", **SIZES).save_pretrained(tmp_path)
    make_tokenizer(VOCAB).save_pretrained(tmp_path)
    model = loaded(tmp_path, load_in)
    experts = [weight for weight in model.parameters() if weight.ndim == 3]
    assert experts
    assert all(weight.dtype == torch.float32 for weight in experts)
    planned = shape_of(str(tmp_path), dtype="float32", quantised=load_in).weights_bytes
    assert model_shape(model).weights_bytes == pytest.approx(planned, rel=0.01)


@needs_library
def test_generate_quantises_and_takes_an_adapter_with_it(llama: Path, tmp_path: Path) -> None:
    import peft

    from lora_files import save_lora

    lora = save_lora(llama, tmp_path)
    tokens = random_tokens(1, 40)
    parts = headinfer.generate(
        *(llama, tokens),
        **{"load_in": "4bit", "adapter": lora, "device": "cpu"},
        **{"do_sample": False, "max_new_tokens": 10},
    )
    settings = BitsAndBytesConfig(**STOCK["4bit"])
    stock = AutoModelForCausalLM.from_pretrained(llama, quantization_config=settings)
    stock = peft.PeftModel.from_pretrained(stock, lora).eval()
    ids = stock.generate(input_ids=tokens, do_sample=False, max_new_tokens=10)[0, 40:]
    expected = make_tokenizer().decode(ids, skip_special_tokens=True)
    assert "".join(part.text for part in parts) == expected


@needs_library
def test_a_model_that_is_quantised_already(llama: Path, tmp_path: Path) -> None:
    loaded(llama, "4bit").save_pretrained(tmp_path)
    source = ModelSource(name=str(tmp_path), load_in="8bit")
    with pytest.raises(ModelLoadError, match="quantised already, by bitsandbytes; load it as it"):
        load_config(source)
    with pytest.raises(ModelLoadError, match="quantised already; plan for it as it is"):
        shape_of(str(tmp_path), quantised="4bit")


@needs_library
def test_matrices_that_cannot_be_packed_for_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.nn import modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    folder = save_llama(tmp_path, hidden_size=96, intermediate_size=128)
    with pytest.raises(ModelLoadError) as raised:
        loaded(folder, "4bit")
    assert "q_proj is of 96 x 96, not of multiples of 32 x 64; take 8bit" in str(raised.value)
    assert loaded(folder, "8bit") is not None


def test_without_the_library_an_error_says_what_to_install(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headinfer.generation.quantised.find_spec", lambda _name: None)
    parts = headinfer.generate(llama, "w1", load_in="8bit")
    with pytest.raises(ModelLoadError, match=r"^weights in 8bit need bitsandbytes: pip install"):
        next(parts)


def test_other_forms_are_refused_at_once(llama: Path) -> None:
    with pytest.raises(OptionError, match="load_in must be one of 4bit, 8bit, not '3bit'"):
        headinfer.generate(llama, "w1", load_in="3bit")
    with pytest.raises(OptionError, match="load_in='4bit' is for models that are loaded here"):
        headinfer.generate(loaded(llama, None), "w1", tokenizer=make_tokenizer(), load_in="4bit")
