"""A small model, and how tests attach it above a disk or, to compare, without one."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.offload import Offload
from tiny_models import tiny_model

MEMORY = "400KiB"
"""128 KiB of it are for what is read. A block of 64 tokens takes 32 KiB in both layers."""

SETTINGS: dict[str, Any] = {
    "device": "simulated",
    "tile_heads": 1,
    "tile_tokens": 64,
    "chunk_tokens": 90,
    "resident_tokens": 0,
    "host_attention": "off",
}


def small_model() -> PreTrainedModel:
    return tiny_model(
        "llama3", num_hidden_layers=2, num_key_value_heads=2, num_attention_heads=4
    ).eval()


def attached(
    model: PreTrainedModel,
    folder: Path | None,
    memory: str = MEMORY,
    device: SimulatedDevice | None = None,
    **options: Any,
) -> Offload:
    """Attach with tiles of 64 tokens, in limited memory above a folder; without one, in all."""
    settings = {
        **SETTINGS,
        "disk_cache": folder,
        "host_memory": None if folder is None else memory,
        **options,
    }
    return headinfer.attach(model, simulated_device=device or SimulatedDevice(), **settings)
