"""An engine that leaves all it holds to the host, and what a test does with it."""

import dataclasses

import pytest
import torch

from attended import only, reference
from headinfer.attend.work import Kernel
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.balance import Balance
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.plan.options import Options
from headinfer.plan.resolve import resolve
from shapes import model_shape

DIM = 16


def stored(layer_idx: int = 0, batch: int = 1) -> torch.Tensor:
    """Return the keys, and values, that a layer holds at first."""
    generator = torch.Generator().manual_seed(layer_idx)
    return torch.randn(batch, 2, 40, DIM, generator=generator)


def engine_with_host_share(
    device: SimulatedDevice, layers: int = 1, batch: int = 1, chunk_tokens: int = 8
) -> Engine:
    """Return an engine that leaves all of the 40 tokens it holds to the host."""
    plan = resolve(
        model_shape(layers=layers, group=1, key_dim=DIM, value_dim=DIM),
        Options(chunk_tokens=chunk_tokens, tile_tokens=16),
        device="simulated",
        batch=batch,
    )
    engine = Engine(device, dataclasses.replace(plan, host_share=1.0), torch.float32, Stats())
    engine.expect(41)
    for layer_idx in range(layers):
        engine.append(layer_idx, stored(layer_idx, batch), stored(layer_idx, batch))
    return engine


def decode(
    engine: Engine, host_kernel: Kernel, layer_idx: int = 0, tokens: int = 1, group: int = 1
) -> torch.Tensor:
    """Let a layer attend new tokens: one, or as many as are verified at once."""
    generator = torch.Generator().manual_seed(tokens)
    new = torch.randn(engine.plan.batch, 2, tokens, DIM, generator=generator)
    new = new if tokens > 1 else torch.ones_like(new)
    return engine.attend(
        layer_idx,
        new.repeat_interleave(group, dim=1),
        new,
        new,
        kernels=reference(),
        scale=1.0,
        host_kernels=only(host_kernel),
    )


def launch_a_layer_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it be as where Python asks for a layer before the one before it is done."""
    told = Balance.note

    def note(self: Balance, *, late_s: float, host_s: float, unasked: bool = False) -> None:
        told(self, late_s=late_s, host_s=host_s)

    monkeypatch.setattr(Balance, "note", note)


def grow(engine: Engine) -> None:
    """Have a layer hold 400 tokens more."""
    more = torch.zeros(1, 2, 400, DIM)
    engine.append(0, more, more)


each_store_change = pytest.mark.parametrize(
    "change",
    [
        lambda engine: engine.crop(0, 30),
        lambda engine: engine.clear(),
        lambda engine: engine.close(),
        lambda engine: engine.replan(engine.plan),
        grow,
    ],
    ids=["crop", "clear", "close", "replan", "append"],
)
"""Everything that changes what a layer has stored."""
