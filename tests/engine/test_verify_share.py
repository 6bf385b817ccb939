"""The CPU's share of passes that verify drafts, where several tokens take the CPU longer."""

import dataclasses
import time

import pytest
import torch

from attended import only, reference
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.work import Work
from headinfer.by_context import ByContext
from headinfer.device.simulated import SimulatedDevice
from headinfer.device.simulated_event import SimulatedEvent
from headinfer.engine.balance import Settled
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.plan.options import Options
from headinfer.plan.resolve import resolve
from host_share import launch_a_layer_ahead
from shapes import model_shape

LAYERS, CONTEXT_TOKENS, VERIFIED, DIM = 16, 320, 8, 8
TOKEN_BYTES = 2 * 2 * DIM * torch.float64.itemsize
LINK_BYTES_PER_S = 1e6
PASSES = 40
"""Enough for shares to settle."""

HOST_BYTES_PER_S = {1: 3e6, VERIFIED: 1.5e6}
"""Of a plain step, and of a verifying pass, for which the CPU takes twice as long."""


class Timed(ReferenceKernel):
    """The CPU's kernel, and who finishes first by the bytes that CPU and link have to read.

    Args:
        monkeypatch: lets a clock of its own tell the time.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._now_s = self.host_s = self.link_s = 0.0
        in_order = SimulatedEvent.seconds_to

        def late_s(done: SimulatedEvent, answered: SimulatedEvent) -> float | None:
            if in_order(done, answered) is None:
                return None
            late = self.host_s > self.link_s  # the device had its tiles before the host began
            return self.host_s if late else self.host_s - self.link_s

        monkeypatch.setattr(SimulatedEvent, "seconds_to", late_s)
        launch_a_layer_ahead(monkeypatch)
        monkeypatch.setattr(time, "perf_counter", lambda: self._now_s)

    def attend(self, work: Work) -> None:
        """Attend a layer's part, and take the time of that."""
        num_bytes = sum(part.nbytes for tile in work.tiles for part in tile.kv)
        self.host_s = num_bytes / HOST_BYTES_PER_S[work.query.shape[3]]
        self.link_s = (CONTEXT_TOKENS * TOKEN_BYTES - num_bytes) / LINK_BYTES_PER_S
        self._now_s += self.host_s
        super().attend(work)


class Verifying:
    """An engine whose tokens are all in host memory, and passes that are taken back.

    Args:
        kernel: the CPU's.
        shares: what other engines have settled on.
        context_tokens: to begin with.
    """

    def __init__(
        self,
        kernel: Timed,
        shares: ByContext[Settled] | None = None,
        context_tokens: int = CONTEXT_TOKENS,
    ) -> None:
        shape = model_shape(layers=LAYERS, kv_heads=2, group=2, itemsize=8)
        options = Options.parse(
            tile_heads=2, tile_tokens=160, chunk_tokens=16, draft_tokens=33, resident_tokens=0
        )
        plan = resolve(shape, options, device="simulated")
        plan = dataclasses.replace(plan, host_share=0.5, host_share_adapts=True)
        self._stats, self._kernel = Stats(), kernel
        self._layer_bytes = context_tokens * TOKEN_BYTES
        self.engine = Engine(SimulatedDevice(), plan, torch.float64, self._stats, shares)
        self.engine.expect(context_tokens + VERIFIED)
        for layer in range(LAYERS):
            for _ in range(context_tokens // 8):
                self.engine.append(layer, *torch.ones(2, 1, 2, 8, DIM, dtype=torch.float64))

    def passed(self, tokens: int) -> float:
        """Pass new tokens through all layers; return the CPU's share of what was there before."""
        before = self._stats.bytes_attended_on_host
        for layer in range(LAYERS):
            new = torch.ones(2, 1, 2, tokens, DIM, dtype=torch.float64)
            query = torch.ones(1, 4, tokens, DIM, dtype=torch.float64)
            kernels = {"kernels": reference(), "host_kernels": only(self._kernel)}
            self.engine.attend(layer, query, *new, scale=0.3, **kernels)
        return (self._stats.bytes_attended_on_host - before) / (LAYERS * self._layer_bytes)

    def verified(self, tokens: int) -> float:
        """Pass new tokens and take them back; return the CPU's share."""
        share = self.passed(tokens)
        for layer in range(LAYERS):
            self.engine.crop(layer, tokens)
        return share

    def drafted(self, tokens: int) -> float:
        """Draft tokens; return the CPU's share."""
        self.engine.begin_drafts()
        shares = [self.passed(1) for _ in range(tokens)]
        self.engine.end_drafts()
        return sum(shares)


def test_a_verifying_pass_leaves_the_cpu_less_where_it_takes_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CPU and link finish together in it as in a plain step, and drafts ask neither of them.

    Another cache begins with both shares where its context is about as long.
    """
    kernel, shares = Timed(monkeypatch), ByContext[Settled]()
    run = Verifying(kernel, shares)
    for number in range(PASSES):
        if number % 10 == 0:
            assert run.drafted(2) == 0
        verified, plain = run.verified(VERIFIED), run.verified(1)
    assert plain == pytest.approx(3 / 4, rel=0.06)
    assert verified == pytest.approx(1.5 / 2.5, rel=0.06)
    alike, longer = Verifying(kernel, shares), Verifying(kernel, shares, 5 * CONTEXT_TOKENS)
    assert (alike.verified(VERIFIED), alike.verified(1)) == (verified, plain)
    assert longer.verified(VERIFIED) == pytest.approx(1 / 2, rel=0.02)
    for each in run, alike, longer:
        each.engine.close()
