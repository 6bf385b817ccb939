"""An engine and the same tokens as plain tensors, passed on and compared step by step."""

import dataclasses
import functools
import tempfile

import torch

from attended import reference
from headinfer.attend.table import Kernels
from headinfer.device.base import Device
from headinfer.device.cpu import CpuDevice
from headinfer.device.simulated import SimulatedDevice
from headinfer.disk.file import SpillFile
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.plan.memory import draft_sink_tokens, resident_bytes
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.resolve import resolve
from shapes import model_shape

DIM = 8


@functools.cache
def planned(
    device: str, layers: int, resident: int, share: float, window: int = 0, drafts: int = 0
) -> Plan:
    """Return a plan of small tiles, chunks and pages; on the CPU nothing is resident or shared."""
    shape = model_shape(layers=layers, window_tokens=window, kv_heads=2, group=2, itemsize=8)
    options = Options.parse(tile_heads=1, tile_tokens=16, chunk_tokens=12, draft_tokens=drafts)
    plan = resolve(shape, options, device=device)
    if device == "cpu":
        return plan
    size = resident_bytes(shape, resident_tokens=resident, batch=1)
    return dataclasses.replace(
        plan, resident_tokens=resident, resident_bytes=size, host_share=share
    )


class Conversation:
    """An engine, and the same tokens as plain tensors."""

    def __init__(
        self, plan: Plan, seed: int, kernels: Kernels | None = None, stats: Stats | None = None
    ) -> None:
        device: Device = CpuDevice() if plan.device == "cpu" else SimulatedDevice(seed=seed)
        self.kernels = kernels or reference()
        self.file = SpillFile(tempfile.gettempdir()) if plan.disk_block_tokens else None
        self.engine = Engine(device, plan, torch.float64, stats or Stats(), file=self.file)
        self.windows = [layer.window_tokens for layer in plan.shape.layers]
        self.generator = torch.Generator().manual_seed(seed)
        self.kv = [self.draw(2, 2, 0, DIM) for _ in self.windows]

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def step(self, tokens: int, seen: list[int] | None = None) -> list[torch.Tensor]:
        """Pass tokens through all layers; return what each gives.

        It is compared with attention to `seen` past tokens, or to all; in layers without a window.
        """
        host = self.kernels if self.engine.plan.host_share else None
        outputs = []
        for layer, window in enumerate(self.windows):
            query, new = self.draw(1, 2, 2, tokens, DIM), self.draw(2, 2, tokens, DIM)
            ours = self.engine.attend(
                layer,
                query.flatten(1, 2),
                *new[:, None],
                kernels=self.kernels,
                scale=0.3,
                window_tokens=window or None,
                host_kernels=host,
            )
            past = self.kv[layer] if seen is None or window else self.kv[layer][:, :, seen]
            self.kv[layer] = torch.cat((self.kv[layer], new), dim=2)
            keys, values = torch.cat((past, new), dim=2)[:, None]
            wanted = by_definition(query, keys, values, window)
            torch.testing.assert_close(ours, wanted.flatten(2, 3))
            outputs.append(ours)
        return outputs

    def draft(self, tokens: int) -> None:
        """Draft tokens one by one, compare each with what it is to attend, and forget them."""
        plan, past, kv = self.engine.plan, self.kv[0].shape[2], list(self.kv)
        sinks = draft_sink_tokens(plan.draft_tokens)
        seen = [*range(sinks), *range(past - plan.draft_tokens + sinks, past)]
        self.engine.begin_drafts()
        for drafted in range(tokens):
            self.step(1, [*seen, *range(past, past + drafted)])
            assert self.engine.lengths() == [past + drafted + 1] * len(kv)
        self.engine.end_drafts()
        self.kv = kv

    def fork(self) -> None:
        """Go on with a copy of the engine."""
        like = self.engine
        engine = Engine(like.device, like.plan, like.dtype, Stats(), file=self.file)
        engine.copy_from(self.engine)
        self.engine.close()
        self.engine = engine

    def crop(self, tokens: int) -> None:
        for layer in range(len(self.windows)):
            self.engine.crop(layer, tokens)
            self.kv[layer] = self.kv[layer][:, :, :-tokens]


def by_definition(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int
) -> torch.Tensor:
    """Return causal attention, within a window if there is one, by its definition."""
    q_len, kv_len = query.shape[3], keys.shape[2]
    hidden = torch.ones(q_len, kv_len).triu(kv_len - q_len + 1).bool()
    if window:
        hidden |= torch.ones(q_len, kv_len).tril(kv_len - q_len - window).bool()
    scores = query @ keys.unsqueeze(2).transpose(-1, -2) * 0.3
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ values.unsqueeze(2)).permute(0, 3, 1, 2, 4)
