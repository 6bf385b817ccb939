"""The host's share as jobs: in stream order, without Python, and with nothing kept too long."""

import shutil
import sys
import weakref
from collections.abc import Callable

import pytest
import torch

from attended import attended, reference
from headinfer.attend.native import kernel as native
from headinfer.attend.native.job import Job
from headinfer.attend.native.kernel import NativeKernel
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.work import Work
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine import host_attention
from headinfer.engine.engine import Engine
from held_device import HeldDevice
from host_share import DIM, decode, each_store_change, engine_with_host_share, grow, stored

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="no jobs without a C compiler"
)


class Unused(NativeKernel):
    """Makes jobs, and must not be called."""

    def attend(self, _work: Work) -> None:
        raise AssertionError("Python ran where a job was to")


def answer_to(layer_idx: int) -> torch.Tensor:
    """Return what the host makes of a layer's stored tokens."""
    query, kv = torch.ones(1, 2, 1, 1, DIM), stored(layer_idx)
    return attended(reference(), query, kv, kv, scale=1.0).out


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_jobs_give_what_a_kernel_in_python_gives(seed: int, batch: int) -> None:
    results = []
    for kernel in (Unused(), ReferenceKernel()):
        engine = engine_with_host_share(SimulatedDevice(seed=seed), batch=batch)
        results.append([decode(engine, kernel) for _ in range(20)])  # of which some are stored
        engine.close()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("tokens", "asked"), [(5, 32), (16, 40), (17, 0)])
def test_jobs_attend_for_all_tokens_that_are_verified_at_once(tokens: int, asked: int) -> None:
    results = []
    for kernel in (Unused(), ReferenceKernel()):
        engine = engine_with_host_share(SimulatedDevice(), chunk_tokens=32)
        results.append(decode(engine, kernel, tokens=tokens, group=4))
        on_host = engine._stats.bytes_attended_on_host
        assert on_host == engine._ledgers[0].geometry.num_bytes(asked)
        engine.close()
    torch.testing.assert_close(*results)


def test_a_store_in_several_segments() -> None:
    results = []
    for kernel in (Unused(), ReferenceKernel()):
        engine = engine_with_host_share(SimulatedDevice())
        grow(engine)
        assert len(list(engine._ledgers[0].host_tiles(0, 440))) > 1
        results.append(decode(engine, kernel))
        engine.close()
    torch.testing.assert_close(*results)


def test_the_caller_waits_for_no_job_and_each_has_memory_of_its_own() -> None:
    device, kernel = HeldDevice(), Unused()
    engine = engine_with_host_share(device, layers=3)
    for layer_idx in range(3):
        decode(engine, kernel, layer_idx)
    pending = [work for work, _ in engine._host.pending]
    assert [type(work) for work in pending] == 3 * [Job]
    assert not any(work.finished for work in pending)
    assert len({work.argument for work in pending}) == 3
    (exchange,) = engine._host._exchanges.values()
    for layer_idx, work in enumerate(pending):
        while not work.finished:
            assert device.host_work.step(force=True)
        torch.testing.assert_close(exchange.on_host.out, answer_to(layer_idx))
    engine.close()


@each_store_change
def test_a_store_that_changes_does_not_change_what_is_pending(
    change: Callable[[Engine], None],
) -> None:
    device = HeldDevice()
    engine = engine_with_host_share(device)
    decode(engine, Unused())
    (exchange,) = engine._host._exchanges.values()
    change(engine)
    if not engine.closed:
        grow(engine)
    device.synchronize()
    torch.testing.assert_close(exchange.on_host.out, answer_to(0))


def test_nothing_is_kept_once_it_ran() -> None:
    device = SimulatedDevice()
    engine = engine_with_host_share(device)
    decode(engine, Unused())
    memory = weakref.ref(next(engine._ledgers[0].host_tiles(0, 1)).whole.keys.untyped_storage())
    assert not engine._host.pending  # it was collected
    engine.clear()
    assert memory() is None
    engine.close()
    assert device.allocated_bytes == 0


def test_times_are_told_to_the_caller_who_next_comes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[float, float]] = []
    monkeypatch.setattr(
        host_attention, "listeners", [lambda start_s, end_s: heard.append((start_s, end_s))]
    )
    device = HeldDevice()
    engine = engine_with_host_share(device, layers=2)
    for layer_idx in range(2):
        decode(engine, Unused(), layer_idx)
    device.finish_compute()
    assert not heard
    assert engine._stats.host_attention_s == 0
    engine.check()
    assert len(heard) == 2
    assert engine._stats.host_attention_s == sum(end_s - start_s for start_s, end_s in heard) > 0
    decode(engine, Unused())
    engine.close()  # settles, and then takes in what ran
    assert len(heard) == 3


def test_without_a_job_library_the_kernel_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "job_library", lambda _dtype: None)
    engine = engine_with_host_share(SimulatedDevice())
    result = decode(engine, NativeKernel())
    torch.testing.assert_close(
        result, decode(engine_with_host_share(SimulatedDevice()), NativeKernel())
    )
    with pytest.raises(AssertionError, match="Python ran"):
        decode(engine, Unused())
    engine.close()


def test_buffers_made_in_inference_mode_serve_outside_it() -> None:
    engine = engine_with_host_share(SimulatedDevice())
    with torch.inference_mode():
        first = decode(engine, Unused())
    with torch.no_grad():
        again = decode(engine, Unused())
    assert first.isfinite().all()
    assert again.isfinite().all()
    engine.close()
