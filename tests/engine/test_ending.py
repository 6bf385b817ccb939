"""Work in flight is waited for before its memory goes, also where Ctrl-C comes in between."""

import sys
import time
import weakref

import pytest
import torch

from headinfer.device.base import Edge
from headinfer.device.simulated import SimulatedDevice
from headinfer.device.simulated_event import SimulatedEvent
from headinfer.engine import ending
from held_device import HeldDevice
from host_share import engine_with_host_share


class Owner:
    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.settled = 0

    def settle(self) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.settled += 1


def test_what_is_alive_is_settled_at_exit_whatever_the_others_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ending, "_alive", weakref.WeakSet())
    owners = [Owner(), Owner(RuntimeError("the device failed")), Owner()]
    gone = Owner()
    for owner in (*owners, gone):
        ending.settle_at_exit(owner)
    del gone
    ending._settle_all()
    assert sorted(owner.settled for owner in owners) == [0, 1, 1]


def test_an_engine_is_settled_at_exit() -> None:
    device = HeldDevice()
    engine = engine_with_host_share(device)
    device.copy_in.copy(torch.empty(4), torch.ones(4))
    ending._settle_all()
    assert device.copy_in.record().reached
    ending._settle_all()
    engine.close()
    ending._settle_all()


def test_ctrl_c_in_the_middle_of_the_last_wait_is_heard_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = HeldDevice()
    engine = engine_with_host_share(device)
    right, waits, ignored = SimulatedEvent.synchronize, [], []

    def interrupted(event: SimulatedEvent, edge: Edge) -> None:
        waits.append(edge)
        if len(waits) == 2:
            raise KeyboardInterrupt
        right(event, edge)

    monkeypatch.setattr(SimulatedEvent, "synchronize", interrupted)
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    heard = False
    try:
        del engine
        assert len(waits) == 5  # all three once more
        for _ in range(1000):
            time.sleep(0.01)
    except KeyboardInterrupt:
        heard = True
    assert heard
    assert not ignored


def test_a_stream_broken_off_while_it_counts_its_work_is_still_run_to_its_end() -> None:
    device = SimulatedDevice()
    stream = device.copy_in
    destination, first, second = torch.zeros(4), torch.ones(4), torch.full((4,), 2.0)
    stream.copy(destination, first)
    stream._queue.append(lambda _force: True)  # as Ctrl-C leaves it before it was counted
    stream.copy(destination, second)
    stream.record().synchronize(Edge.HOST_SETTLED)
    assert torch.equal(destination, second)
