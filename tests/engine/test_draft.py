"""A pass that attends only what is on the device, while the next pass's tiles are on their way."""

import dataclasses
from typing import Any

import pytest
import torch

from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.table import Kernels
from headinfer.device.base import Device
from headinfer.device.cpu import CpuDevice
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine import executor
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.plan.memory import resident_bytes
from headinfer.plan.options import Options
from headinfer.plan.resolve import resolve
from headinfer.schedule.route import Held, Pass, route_track
from headinfer.schedule.steps import TrackSteps
from shapes import model_shape

DIM, LAYERS, PROMPT_TOKENS, RESIDENT_TOKENS = 8, 3, 70, 20
KERNELS = Kernels([ReferenceKernel()])


class Conversation:
    """An engine and plain tensors of the same tokens."""

    def __init__(self, seed: int, stats: Stats, device: Device | None = None) -> None:
        device = device or SimulatedDevice(seed=seed)
        shape = model_shape(
            layers=LAYERS, kv_heads=2, group=2, key_dim=DIM, value_dim=DIM, itemsize=8
        )
        options = Options.parse(tile_heads=1, tile_tokens=16, chunk_tokens=12)
        plan = resolve(shape, options, device=device.name)
        if not device.tiles_are_views:
            size = resident_bytes(shape, resident_tokens=RESIDENT_TOKENS, batch=1)
            plan = dataclasses.replace(plan, resident_tokens=RESIDENT_TOKENS, resident_bytes=size)
        self.engine = Engine(device, plan, torch.float64, stats)
        self.page_tokens = plan.page_tokens
        self.generator = torch.Generator().manual_seed(seed)
        self.kv = [self.draw(2, 2, 0, DIM) for _ in range(LAYERS)]

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def step(self, tokens: int, kind: Pass, seen: list[int] | None = None) -> None:
        """Pass tokens through all layers, and compare each with attention to `seen` past tokens."""
        for layer in range(LAYERS):
            query, new = self.draw(1, 2, 2, tokens, DIM), self.draw(2, 2, tokens, DIM)
            keys, values = new[:, None]
            ours = self.engine.attend(
                layer,
                query,
                keys,
                values,
                kernels=Kernels([ReferenceKernel()]),
                scale=0.3,
                kind=kind,
            )
            past = self.kv[layer] if seen is None else self.kv[layer][:, :, seen]
            self.kv[layer] = torch.cat((self.kv[layer], new), dim=2)
            keys, values = torch.cat((past, new), dim=2)[:, None]
            hidden = torch.ones(tokens, keys.shape[2]).triu(keys.shape[2] - tokens + 1).bool()
            scores = query @ keys.unsqueeze(2).transpose(-1, -2) * 0.3
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            wanted = (weights @ values.unsqueeze(2)).permute(0, 3, 1, 2, 4)
            torch.testing.assert_close(ours, wanted)

    def crop(self, tokens: int) -> None:
        for layer in range(LAYERS):
            self.engine.crop(layer, tokens)
            self.kv[layer] = self.kv[layer][:, :, :-tokens]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("drafted", [[1, 1, 1], [2, 1], [3]])
def test_drafts_attend_what_is_on_the_device(seed: int, drafted: list[int]) -> None:
    chat = Conversation(seed, Stats())
    chat.step(PROMPT_TOKENS, Pass.FORWARD)
    chat.step(1, Pass.FORWARD)
    near = [*range(RESIDENT_TOKENS), PROMPT_TOKENS]
    for tokens in drafted:
        chat.step(tokens, Pass.DRAFT, near)
        near += range(near[-1] + 1, near[-1] + 1 + tokens)
    chat.crop(sum(drafted))
    chat.step(sum(drafted), Pass.FORWARD)
    chat.step(1, Pass.FORWARD)
    chat.engine.close()


def test_drafts_leave_the_next_passs_tiles_on_their_way() -> None:
    fetched = []
    for drafts in (0, 3):
        stats = Stats()
        chat = Conversation(0, stats)
        chat.step(PROMPT_TOKENS, Pass.FORWARD)
        chat.step(1, Pass.FORWARD)
        before = stats.bytes_to_device
        near = [*range(RESIDENT_TOKENS), PROMPT_TOKENS]
        for draft in range(drafts):
            chat.step(1, Pass.DRAFT, near)
            near.append(PROMPT_TOKENS + 1 + draft)
        assert stats.bytes_to_device == before, "a draft fetches nothing"
        if drafts:
            chat.crop(drafts)
        chat.step(1, Pass.FORWARD)
        fetched.append(stats.bytes_to_device)
        chat.engine.close()
    assert fetched[0] == fetched[1]


def test_drafts_that_fill_a_page_are_sent_home_like_other_tokens() -> None:
    chat = Conversation(1, Stats())
    chat.step(PROMPT_TOKENS, Pass.FORWARD)
    for _ in range(chat.page_tokens + 2):
        tokens = chat.kv[0].shape[2]
        home = (tokens - PROMPT_TOKENS) // chat.page_tokens * chat.page_tokens
        near = [*range(RESIDENT_TOKENS), *range(PROMPT_TOKENS + home, tokens)]
        chat.step(1, Pass.DRAFT, near)
    chat.step(1, Pass.FORWARD)
    chat.engine.close()


def test_steps_are_made_anew_only_where_tokens_move(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(held: Held, *args: Any) -> TrackSteps:
        made.append(held)
        return route_track(held, *args)

    monkeypatch.setattr(executor, "route_track", counted)
    for device in (CpuDevice(), SimulatedDevice()):
        chat = Conversation(0, Stats(), device)
        chat.step(PROMPT_TOKENS, Pass.FORWARD)
        made.clear()
        for _ in range(3 * chat.page_tokens):
            chat.step(1, Pass.FORWARD)
        # Each page: steps to fill it, and to send it home. In place no token ever moves.
        assert len(made) == LAYERS * (1 if device.tiles_are_views else 6)
        chat.engine.close()
