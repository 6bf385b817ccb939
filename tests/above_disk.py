"""A small model, and how tests attach it above a disk or, to compare, without one."""

import copy
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.integration.memory_held import held_together
from headinfer.offload import Offload
from headinfer.units import parse_bytes
from tiny_models import random_tokens, tiny_model

MEMORY = "400KiB"
"""128 KiB of it are for what is read. A block of 64 tokens takes 32 KiB in both layers."""

TOKENS = 700

FAULTS = pytest.mark.parametrize(
    ("call", "number", "told"),
    [("pwritev", errno.ENOSPC, "has no room"), ("preadv", errno.EIO, "failed: Input/output error")],
    ids=["full", "read"],
)
"""What of `os` fails, with which error, and what is told then."""

SETTINGS: dict[str, Any] = {
    "device": "simulated",
    "tile_heads": 1,
    "tile_tokens": 64,
    "chunk_tokens": 90,
    "resident_tokens": 0,
    "host_attention": "off",
}


def small_model(layers: int = 2) -> PreTrainedModel:
    return tiny_model(
        "llama3", num_hidden_layers=layers, num_key_value_heads=2, num_attention_heads=4
    ).eval()


def attached(
    model: PreTrainedModel,
    folder: Path | None,
    memory: str = MEMORY,
    device: SimulatedDevice | list[SimulatedDevice] | None = None,
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


def exercise(
    model: PreTrainedModel,
    folder: Path | None,
    device: SimulatedDevice | list[SimulatedDevice],
    rows: int = 1,
    tokens: int = TOKENS,
    **options: Any,
) -> torch.Tensor:
    """Go through all that moves tokens on the disk, and return all logits."""
    prompt, outputs = random_tokens(rows, tokens), []

    def step(cache: Any, tokens: torch.Tensor) -> None:
        outputs.append(model(tokens, past_key_values=cache, logits_to_keep=2).logits[:1])

    with attached(model, folder, device=device, **options) as offload:
        cache = offload.new_cache(tokens + 300)
        step(cache, prompt)
        for at in range(3):
            step(cache, prompt[:, at : at + 1])
        assert (offload.stats.bytes_from_disk > 0) is (folder is not None)
        for at in range(6):  # pages are sent home before what they wait for is attended
            step(cache, prompt[:, 9 * at : 9 * at + 9])
        copied = copy.deepcopy(cache)  # which shares blocks in memory and on the disk
        step(copied, prompt[:, :70])
        step(cache, prompt[:, :140])  # beyond blocks that the copy holds, too
        if folder is not None:
            limit_bytes = parse_bytes(options.get("host_memory", MEMORY), "host_memory")
            assert held_together([cache, copied]) <= limit_bytes
        cache.crop(133 - cache.get_seq_length())  # into a block on the disk
        step(cache, prompt[:, :99])
        cache.crop(128 - cache.get_seq_length())  # where one ends
        step(cache, prompt[:, 7:210])
        outputs.append(copied.layers[-1].keys.flatten())
        if rows > 1:
            copied.reorder_cache(torch.tensor([1, 0]))
            step(copied, prompt[:, :3])
            copied.batch_select_indices(torch.tensor([1]))
            step(copied, prompt[:1, :9])
        copied.park()
        step(copied, prompt[: 1 if rows > 1 else rows, :4])
        cache.close()
        step(copied, prompt[:1, :2])
        copied.close()
    for each in device if isinstance(device, list) else [device]:
        each.memory.check()
    return torch.cat([output.flatten() for output in outputs])


class Failing:
    """A system call that fails from some call on.

    Args:
        real: the call.
        error: what it then raises.
        calls: that go well.
    """

    def __init__(self, real: Any, error: OSError, calls: int) -> None:
        self.real, self.error, self.left = real, error, calls

    def __call__(self, *args: Any) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.real(*args)
