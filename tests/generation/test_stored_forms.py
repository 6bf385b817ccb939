"""Checkpoints that were quantised before: what they take, what they answer, what they need."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

import headinfer
from captured import generated
from headinfer.cli.shapes import shape_of
from headinfer.errors import ModelLoadError
from headinfer.generation.model import ModelSource, load_config, load_model
from headinfer.integration.even_map import even_map
from headinfer.integration.model_shape import model_shape
from saved_models import save_llama, save_tokenizer
from tiny_models import random_tokens

SIZES = {"hidden_size": 256, "intermediate_size": 512, "eos_token_id": None}
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4 bits, scales in 8": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "8 bits": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
TORCHAO: dict[str, dict[str, Any]] = {
    "Int8WeightOnlyConfig": {},
    "Float8WeightOnlyConfig": {},
    "IntxWeightOnlyConfig": {"weight_dtype": torch.int4},  # kept in a byte each
    "Int8DynamicActivationInt8WeightConfig": {},  # a scale for each token
}
COMPRESSED = {
    "4 bits": ({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}, 7),
    "8 bits": ({"num_bits": 8, "type": "int", "strategy": "channel"}, 127),
    "fp8": ({"num_bits": 8, "type": "float", "strategy": "channel"}, 448),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"), **SIZES)


@pytest.fixture(autouse=True)
def _no_words_of_libraries() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def by_bitsandbytes(form: str, llama: Path, folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = BitsAndBytesConfig(**BITSANDBYTES[form])
    loaded(llama, quantization_config=settings).save_pretrained(folder)


def by_torchao(form: str, llama: Path, folder: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    settings = TorchAoConfig(getattr(quantization, form)(**TORCHAO[form]))
    loaded(llama, quantization_config=settings).save_pretrained(folder)


def by_compressed_tensors(form: str, llama: Path, folder: Path) -> None:
    compressed = pytest.importorskip("compressed_tensors")
    from compressed_tensors import quantization

    how, most = COMPRESSED[form]
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(symmetric=True, **how)
    )
    settings = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head"], quantization_status="frozen"
    )
    model = loaded(llama)
    quantization.apply_quantization_config(model, settings)
    for module in model.modules():
        if (scales := getattr(module, "weight_scale", None)) is not None:
            rows, groups = scales.shape
            largest = module.weight.data.view(rows, groups, -1).abs().amax(-1)
            scales.data = (largest / most).to(scales.dtype)
    compressor = compressed.ModelCompressor(quantization_config=settings)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def fp8_by_hand(llama: Path, folder: Path) -> None:
    """Save a model in fp8, with a scale for each block of 128 x 128."""
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    weights = load_file(llama / "model.safetensors")
    for name, weight in list(weights.items()):
        if "_proj" in name:
            rows, columns = weight.shape
            blocks = weight.reshape(rows // 128, 128, columns // 128, 128)
            scales = blocks.abs().amax((1, 3)) / 448
            packed = (blocks / scales[:, None, :, None]).reshape(rows, columns)
            weights[name] = packed.to(torch.float8_e4m3fn)
            weights[name.replace("weight", "weight_scale_inv")] = scales
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    (folder / "config.json").write_text(json.dumps(config))


CHECKPOINTS: list[tuple[Callable[[str, Path, Path], None], str]] = [
    *((by_bitsandbytes, form) for form in BITSANDBYTES),
    *((by_torchao, form) for form in TORCHAO),
    *((by_compressed_tensors, form) for form in COMPRESSED),
]


def loaded(folder: Path, **keywords: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **keywords).eval()


@pytest.mark.parametrize(
    ("make", "form"), CHECKPOINTS, ids=[f"{make.__name__[3:]} {form}" for make, form in CHECKPOINTS]
)
def test_a_quantised_checkpoint_is_counted_and_answers_as_stock(
    make: Callable[[str, Path, Path], None], form: str, llama: Path, tmp_path: Path
) -> None:
    make(form, llama, tmp_path)
    source = ModelSource(name=str(tmp_path))
    model, _ = load_model(source, load_config(source), dtype="auto", device="cpu")
    tokens = random_tokens(1, 60) % 90
    with headinfer.attach(model, device="cpu", chunk_tokens=16) as offload:
        taken = offload.plan.shape.weights_bytes
        found = generated(model, tokens, offload.new_cache())
    # Over GPUs it is spread by what it takes; where weights are quantised, a tenth is kept free.
    config = load_config(source)
    assert even_map(config, "auto", None, [int(1.15 * taken)]) is not None
    assert even_map(config, "auto", None, [int(0.75 * taken)]) is None
    # What the first call unpacks was counted before it.
    assert model_shape(model).weights_bytes < 1.01 * taken
    assert shape_of(str(tmp_path)).weights_bytes == pytest.approx(taken, rel=0.01)
    stock = loaded(tmp_path)
    expected = generated(stock, tokens, DynamicCache(config=stock.config))
    assert found.sequences.tolist() == expected.sequences.tolist()


def test_fp8_without_a_gpu_is_unpacked_and_answers_as_stock(llama: Path, tmp_path: Path) -> None:
    fp8_by_hand(llama, tmp_path)
    source = ModelSource(name=str(tmp_path))
    model, _ = load_model(source, load_config(source), dtype="auto", device="cpu")
    tokens = random_tokens(1, 60) % 90
    with headinfer.attach(model, device="cpu", chunk_tokens=16) as offload:
        taken = offload.plan.shape.weights_bytes
        found = generated(model, tokens, offload.new_cache())
    assert taken == shape_of(str(llama)).weights_bytes
    stock = loaded(tmp_path)
    expected = generated(stock, tokens, DynamicCache(config=stock.config))
    assert found.sequences.tolist() == expected.sequences.tolist()
    plain = loaded(llama)
    unpacked = generated(plain, tokens, DynamicCache(config=plain.config))
    assert not torch.equal(found.logits[0], unpacked.logits[0])  # it was quantised


@pytest.mark.parametrize(
    ("method", "module", "packages"),
    [
        ("awq", "gptqmodel", "gptqmodel"),
        ("compressed-tensors", "compressed_tensors", "compressed-tensors"),
        ("gptq", "gptqmodel", "optimum gptqmodel"),
        ("hqq", "hqq", "hqq"),
        ("torchao", "torchao", "torchao"),
    ],
)
def test_without_the_library_one_line_says_what_to_install(
    method: str, module: str, packages: str, llama: Path, tmp_path: Path
) -> None:
    if find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    values = json.loads((llama / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": settings}))
    save_tokenizer(tmp_path, chat=False)
    with pytest.raises(ModelLoadError) as refused:
        for _ in headinfer.generate(str(tmp_path), random_tokens(1, 4), device="cpu"):
            pass
    message = str(refused.value)
    assert f"is quantised by {method}, which needs " in message
    missing = [each for each in packages.split() if find_spec(each.replace("-", "_")) is None]
    assert message.endswith(f": pip install {' '.join(missing)}")
    assert "\n" not in message


@pytest.mark.parametrize("packed", [True, False])
def test_weights_that_the_first_call_unpacks_count_unpacked(packed: bool) -> None:
    """As compressed-tensors marks them, which need not be installed."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    inner = model[0]
    inner.quantization_scheme = object()
    inner.weight_scale = torch.nn.Parameter(torch.zeros(32, 1))
    codes = torch.nn.Parameter(torch.zeros(32, 64, dtype=torch.int8), requires_grad=False)
    if packed:
        del inner.weight
        inner.weight_packed = torch.nn.Parameter(
            torch.zeros(32, 8, dtype=torch.int32), requires_grad=False
        )
    else:
        inner.weight = codes
    from headinfer.integration.stored_weights import weights_bytes

    stored = 32 * 8 * 4 if packed else 32 * 64
    assert weights_bytes(model) == stored + 32 * 4
    model.ct_decompress_hook = object()
    assert weights_bytes(model) == 32 * 64 * 4 + 32 * 4
