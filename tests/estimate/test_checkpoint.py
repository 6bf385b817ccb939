"""What quantised weights take by the headers of their files, and by their config alone."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from headinfer.cli.shapes import shape_of
from headinfer.errors import ModelLoadError
from headinfer.estimate.checkpoint import checkpoint_bytes
from headinfer.estimate.presets import PRESETS
from saved_models import save_llama

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


def save(folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


def linear(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Return one matrix as GPTQ writes it: eight codes in an int32, a scale for each 128."""
    groups = rows // 128
    return {
        "qweight": torch.zeros(rows // 8, columns, dtype=torch.int32),
        "qzeros": torch.zeros(groups, columns // 8, dtype=torch.int32),
        "scales": torch.zeros(groups, columns, dtype=torch.float16),
        "g_idx": torch.zeros(rows, dtype=torch.int32),
    }


def test_codes_and_scales_count_as_stored_and_weights_in_the_models_dtype(tmp_path: Path) -> None:
    packed = {f"model.layers.0.mlp.up_proj.{key}": t for key, t in linear(256, 512).items()}
    plain = {
        "model.embed_tokens.weight": torch.zeros(96, 256),
        "lm_head.weight": torch.zeros(96, 256),
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(256),
    }
    folder = save(tmp_path, packed | plain)
    codes = 256 * 512 // 2 + 2 * 512 // 2 + 2 * 512 * 2 + 256 * 4
    for itemsize in (2, 4):
        found = checkpoint_bytes(folder, itemsize, tied=False)
        assert found == codes + (2 * 96 * 256 + 256) * itemsize
    assert checkpoint_bytes(folder, 2, tied=True) == codes + (96 * 256 + 256) * 2


def test_files_are_those_that_the_index_names(tmp_path: Path) -> None:
    parts = ("a.safetensors", "b.safetensors")
    for part in (*parts, "another.safetensors"):
        save(tmp_path, {f"{part}.weight": torch.zeros(10)}, part)
    assert checkpoint_bytes(tmp_path, 4, tied=False) is None
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"{part}.weight": part for part in parts}}))
    assert checkpoint_bytes(tmp_path, 4, tied=False) == 80
    (tmp_path / parts[0]).unlink()
    with pytest.raises(ModelLoadError, match=r"lacks a\.safetensors, which model\."):
        checkpoint_bytes(tmp_path, 4, tied=False)
    index.write_text("[]")
    with pytest.raises(ModelLoadError, match="is damaged: fetch it again"):
        checkpoint_bytes(tmp_path, 4, tied=False)


@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\x10" + b"\x00" * 7 + b"{}", b"\xff" * 20])
def test_a_damaged_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"cannot be read: its header is damaged: fetch it"):
        checkpoint_bytes(tmp_path, 2, tied=False)


def test_a_plan_reads_a_quantised_folder_and_no_other(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model")
    plain = shape_of(str(folder)).weights_bytes
    save(folder, {"model.norm.weight": torch.zeros(1000)})
    assert shape_of(str(folder)).weights_bytes == plain
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": GPTQ}))
    buffers = 2 * 4 * 4  # rotary frequencies, kept twice
    assert shape_of(str(folder)).weights_bytes == 4000 + buffers
    (folder / "model.safetensors").unlink()  # so that the config alone tells
    assert shape_of(str(folder)).weights_bytes < plain


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        (GPTQ, 4 + 20 / 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "fp8"}, 8 + 32 / 128**2),
        ({"quant_method": "mxfp8"}, 8.25),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, 8),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnly"}}}, 8),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int4WeightOnly", "_data": {"group_size": 64}}},
            },
            4.5,
        ),
        # They are unpacked when the model is first called.
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, 16),
    ],
)
def test_bits_of_each_method(settings: dict[str, object], bits: float, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**PRESETS["llama-3-8b"], "quantization_config": settings}))
    plain, matrices = 2 * 8_030_261_248, 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    wanted = plain - matrices * (16 - bits) / 8
    assert shape_of(str(file)).weights_bytes == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("settings", [{"quant_method": "odd"}, {"quant_method": "torchao"}])
def test_a_form_that_is_not_known_needs_the_files(settings: dict, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**PRESETS["llama-3-8b"], "quantization_config": settings}))
    with pytest.raises(ModelLoadError, match=r"size is not known; give the folder with its safe"):
        shape_of(str(file))
    folder = save(tmp_path, {"model.norm.weight": torch.zeros(1000)})
    assert shape_of(str(folder)).weights_bytes == 2000 + 2 * 64 * 4
