"""Writes of a region that Ctrl-C, a retry or the collector meet as they begin."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from above_disk import Failing
from headinfer.device.simulated import SimulatedDevice
from headinfer.disk.file import SpillFile, aligned_empty
from headinfer.disk.region import Region
from headinfer.disk.transfer import Transfer
from headinfer.errors import DiskError
from headinfer.kv.write_behind import Leaving, WriteBehind

NUM_BYTES = 4 * SpillFile.ALIGNMENT
_PATIENCE_S = 30.0


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[SpillFile]:
    file = SpillFile(str(tmp_path))
    yield file
    file.close()


def filled(byte: int) -> torch.Tensor:
    return aligned_empty(NUM_BYTES).fill_(byte)


def content(region: Region) -> set[int]:
    """Return which bytes a region gives."""
    into = aligned_empty(region.num_bytes)
    for transfer in region.read(0, into):
        transfer.wait()
    return set(into.tolist())


class LateWrites:
    """A way to have the next write end last, whatever else is written meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._go, self._ended, self._first = threading.Event(), threading.Event(), True
        write = os.pwritev

        def late(fd: int, views: list[memoryview], at: int) -> int:
            if not self._first:
                return write(fd, views, at)
            self._first = False
            assert self._go.wait(_PATIENCE_S)
            written = write(fd, views, at)
            self._ended.set()
            return written

        monkeypatch.setattr(os, "pwritev", late)

    def end(self) -> None:
        """Let it go on, and wait for its end, where there is one."""
        self._go.set()
        assert self._first or self._ended.wait(_PATIENCE_S)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateWrites:
    return LateWrites(monkeypatch)


def interrupted(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call what begins a write, and have Ctrl-C come before anybody has the transfer."""
    begin = SpillFile.write

    def stopped(file: SpillFile, offset: int, memory: torch.Tensor) -> Transfer:
        begin(file, offset, memory)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SpillFile, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            work()


def failed(file: SpillFile, byte: int, monkeypatch: pytest.MonkeyPatch) -> Region:
    """Return a region whose write failed, and somebody was told."""

    region, error = Region(file, filled(byte)), OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", Failing(os.pwritev, error, 0))
        region.begin()
        with pytest.raises(DiskError):
            region.wait()
    return region


def test_a_write_that_nobody_can_wait_for_keeps_its_place_in_the_file(
    spill: SpillFile, late: LateWrites, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Region(spill, filled(1))
    interrupted(first.begin, monkeypatch)
    first.free()
    second = Region(spill, filled(2))
    second.begin()
    second.wait()
    late.end()
    assert content(second) == {2}


def test_a_write_that_nobody_can_wait_for_keeps_its_memory(
    spill: SpillFile, late: LateWrites, monkeypatch: pytest.MonkeyPatch
) -> None:
    behind, memory = WriteBehind(SimulatedDevice()), filled(1)
    behind.limit_bytes = NUM_BYTES
    region = Region(spill, memory)
    interrupted(lambda: behind.begin(Leaving(region, memory, ())), monkeypatch)
    behind.go_on()
    behind.memory(NUM_BYTES).fill_(3)
    late.end()
    assert content(region) == {1}


def test_a_write_that_begins_anew_has_not_landed(
    spill: SpillFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = failed(spill, 1, monkeypatch)
    late, done = LateWrites(monkeypatch), Transfer.done

    def begun_meanwhile(transfer: Transfer) -> bool:
        monkeypatch.setattr(Transfer, "done", done)
        answer = done(transfer)
        region.begin()  # as another thread does
        return answer

    monkeypatch.setattr(Transfer, "done", begun_meanwhile)
    assert not region.landed
    assert content(region) == {1}
    late.end()
    region.wait()
    assert region.landed
    assert content(region) == {1}


def test_what_was_given_back_is_not_begun_anew(
    spill: SpillFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = failed(spill, 1, monkeypatch)
    region.free()
    late = LateWrites(monkeypatch)
    region.begin()
    second = Region(spill, filled(2))
    second.begin()
    late.end()
    second.wait()
    assert content(second) == {2}
