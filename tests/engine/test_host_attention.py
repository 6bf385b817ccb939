"""The host's share as work in stream order: nobody waits for it, and nothing is lost with it."""

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

import headinfer
from attended import only, reference
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.work import Work
from headinfer.device.base import Edge
from headinfer.device.hazards import HazardError
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.balance import Balance
from headinfer.engine.engine import Engine
from headinfer.errors import CacheStateError
from headinfer.integration import attention
from held_device import HeldDevice
from host_share import DIM, decode, each_store_change, engine_with_host_share, grow, stored
from tiny_models import random_tokens, tiny_model


class Failing:
    """A kernel that raises, and counts how often it was called."""

    name = "failing"

    def __init__(self) -> None:
        self.error = ArithmeticError("the host cannot count")
        self.calls = 0

    def serves(self, _work: Work) -> bool:
        return True

    def attend(self, _work: Work) -> None:
        self.calls += 1
        raise self.error


class Recording(ReferenceKernel):
    """Keeps copies of the keys it attends."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[torch.Tensor] = []

    def attend(self, work: Work) -> None:
        self.keys += [tile.kv.keys.clone() for tile in work.tiles]
        super().attend(work)


def test_the_caller_does_not_wait_for_the_host() -> None:
    device, kernel = HeldDevice(), Recording()
    engine = engine_with_host_share(device, layers=3)
    for layer_idx in range(3):
        decode(engine, kernel, layer_idx)
        assert not kernel.keys, "the caller's thread has waited for the CPU"
    device.finish_compute()
    assert len(kernel.keys) == 3
    for layer_idx, keys in enumerate(kernel.keys):
        assert torch.equal(keys, stored(layer_idx))


@each_store_change
def test_a_store_that_changes_does_not_change_what_is_pending(
    change: Callable[[Engine], None],
) -> None:
    device, kernel = HeldDevice(), Recording()
    engine = engine_with_host_share(device)
    decode(engine, kernel)
    change(engine)
    if not engine.closed:
        grow(engine)
    device.synchronize()
    (keys,) = kernel.keys
    assert torch.equal(keys, stored())


def test_rows_are_selected_after_what_is_pending() -> None:
    device, kernel = HeldDevice(), Recording()
    engine = engine_with_host_share(device, batch=2)
    decode(engine, kernel)
    engine.select(0, [1, 0])
    assert torch.equal(kernel.keys[0], stored(batch=2))


def test_an_engine_that_is_dropped_waits_for_what_is_pending() -> None:
    device, kernel = HeldDevice(), Recording()
    engine = engine_with_host_share(device)
    decode(engine, kernel)
    del engine
    gc.collect()
    assert torch.equal(kernel.keys[0], stored())


def test_an_error_reaches_the_caller_as_itself() -> None:
    kernel = Failing()
    engine = engine_with_host_share(SimulatedDevice())
    with pytest.raises(ArithmeticError) as raised:
        decode(engine, kernel)
    assert raised.value is kernel.error
    assert decode(engine, ReferenceKernel()).isfinite().all()  # it is told once
    engine.close()


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: decode(engine, ReferenceKernel()),
        lambda engine: engine.tokens(0),
        lambda engine: engine.crop(0, 1),
        lambda engine: engine.check(),
        lambda engine: engine.clear(),
        lambda engine: engine.close(),
    ],
    ids=["attend", "tokens", "crop", "check", "clear", "close"],
)
def test_an_error_that_comes_late_is_raised_by_the_next_call(
    call: Callable[[Engine], object],
) -> None:
    device, kernel = HeldDevice(), Failing()
    engine = engine_with_host_share(device, layers=2)
    decode(engine, kernel, 0)
    decode(engine, kernel, 1)
    device.finish_compute()
    assert kernel.calls == 1, "what follows a failure has nothing to work on"
    with pytest.raises(ArithmeticError) as raised:
        call(engine)
    assert raised.value is kernel.error
    engine.close()
    assert engine.host_kv_bytes == 0


def test_a_call_that_failed_fails_once() -> None:
    """What it had asked before is not attended after its error was told."""
    device, kernel = HeldDevice(), Failing()
    engine = engine_with_host_share(device, layers=2)
    for layer_idx in range(2):
        decode(engine, kernel, layer_idx)
    (first, _), _ = engine._host.pending
    while not first.finished:
        assert device.host_work.step(force=True)
    with pytest.raises(ArithmeticError):
        engine.check()
    device.finish_compute()
    engine.check()
    assert kernel.calls == 1
    decode(engine, ReferenceKernel())
    device.finish_compute()
    engine.close()


@pytest.mark.parametrize("change", ["clear", "close", "replan", "crop", "select_all"])
def test_an_error_that_comes_while_the_engine_settles_is_raised_by_the_same_call(
    change: str,
) -> None:
    device, kernel = HeldDevice(), Failing()
    engine = engine_with_host_share(device)
    decode(engine, kernel)
    arguments = {"replan": (engine.plan,), "crop": (0, 30), "select_all": ([0], engine.plan)}
    with pytest.raises(ArithmeticError):
        getattr(engine, change)(*arguments.get(change, ()))
    assert engine.closed == (change == "close")
    engine.close()
    assert device.allocated_bytes == 0


def test_an_attention_that_fails_on_the_device_leaves_the_query_to_the_host() -> None:
    """The answer nobody took is waited for before the query's memory is used again."""
    device = SimulatedDevice()
    engine, broken = engine_with_host_share(device), Failing()
    new = torch.ones(1, 2, 1, DIM)
    arguments = (0, new, new, new)
    attend = functools.partial(engine.attend, *arguments, scale=1.0, host_kernels=reference())
    for kernel in (broken, ReferenceKernel()):
        if kernel is broken:
            with pytest.raises(ArithmeticError):
                attend(kernels=only(kernel))
        else:
            attend(kernels=only(kernel))
    engine.close()


def failing_model_call(
    monkeypatch: pytest.MonkeyPatch, device: SimulatedDevice
) -> Iterator[tuple[Callable[[], object], Failing, Callable[[], None]]]:
    model, kernel = tiny_model("llama3"), Failing()
    with headinfer.attach(
        model,
        device="simulated",
        simulated_device=device,
        resident_tokens=0,
        chunk_tokens=16,
        host_attention=1.0,
    ) as offload:
        cache = offload.new_cache()
        model(random_tokens(1, 60), past_key_values=cache)
        monkeypatch.setattr(attention, "_host_kernels", lambda *_: only(kernel))
        yield lambda: model(random_tokens(1, 1), past_key_values=cache), kernel, cache.reset


def test_a_model_call_whose_last_work_failed_gives_no_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for call, kernel, reset in failing_model_call(monkeypatch, HeldDevice()):
        with pytest.raises(ArithmeticError) as raised:
            call()
        assert raised.value is kernel.error
        assert kernel.calls == 1
        with pytest.raises(CacheStateError, match="interrupted"):
            call()
        reset()
        call()  # nothing is stored, so nothing is left to the host


def test_detaching_closes_all_caches_also_where_one_has_an_error_to_tell() -> None:
    model = tiny_model("llama3")
    offload = headinfer.attach(model, device="simulated")
    caches = [offload.new_cache() for _ in range(2)]
    for cache in caches:
        model(random_tokens(1, 20), past_key_values=cache)
    engines = [cache.state.engine for cache in caches]
    for engine in engines:
        engine._host.failure = ArithmeticError("the host cannot count")
    with pytest.raises(ArithmeticError):
        offload.detach()
    assert all(engine.closed for engine in engines)


@pytest.mark.parametrize("seed", range(3))
def test_bytes_and_seconds_are_counted(seed: int) -> None:
    device = SimulatedDevice(seed=seed)
    engine = engine_with_host_share(device)
    decode(engine, ReferenceKernel())
    stats = engine._stats
    assert stats.bytes_attended_on_host == 40 * 2 * DIM * 4 * 2
    assert stats.host_attention_s > 0
    engine.close()


def test_buffers_made_in_inference_mode_serve_outside_it() -> None:
    engine = engine_with_host_share(SimulatedDevice())
    with torch.inference_mode():
        first = decode(engine, ReferenceKernel())
    with torch.no_grad():
        again = decode(engine, ReferenceKernel())
    assert first.isfinite().all()
    assert again.isfinite().all()
    engine.close()


class Judged(Balance):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(1.0, fixed=False)
        self.notes: list[tuple[bool, bool]] = []

    def note(self, *, late_s: float, host_s: float, unasked: bool = False) -> None:
        assert host_s > 0
        self.notes.append((late_s > 0, unasked))


def test_who_was_first_is_told_once_it_is_known() -> None:
    device = HeldDevice()
    engine = engine_with_host_share(device)
    balance = Judged()
    engine._host._balances = SimpleNamespace(at={1: balance}.get)
    decode(engine, ReferenceKernel())
    decode(engine, ReferenceKernel())
    assert not balance.notes  # both are pending
    device.finish_compute()
    assert not balance.notes
    decode(engine, ReferenceKernel())
    # Held back, so later than compute; and the second one was done before the third was asked for.
    assert balance.notes == [(True, False), (True, True)]
    engine.crop(0, 30)
    decode(engine, ReferenceKernel())
    # The third was dropped with what was settled.
    assert balance.notes == [(True, False), (True, True)]
    engine.close()


def test_a_fixed_share_asks_for_no_times() -> None:
    device = SimulatedDevice()
    engine = engine_with_host_share(device)
    decode(engine, ReferenceKernel())
    assert not engine._host._unjudged
    assert next(device.moments) == 0
    engine.close()


def test_a_query_that_is_overwritten_too_early_is_noticed() -> None:
    device = SimulatedDevice(skip=[Edge.ANSWERED])
    engine = engine_with_host_share(device)
    with pytest.raises(HazardError, match="is not ordered after the write on host-work"):
        decode(engine, ReferenceKernel())


@pytest.mark.parametrize(
    "end",
    [lambda engine: engine.close(), lambda engine: engine.replan(engine.plan), lambda engine: None],
    ids=["close", "replan", "drop"],
)
def test_an_answer_is_kept_until_compute_has_read_it(end: Callable[[Engine], None]) -> None:
    class Noting(SimulatedDevice):
        """Notes when all work was waited for, and when memory of an answer's size is gone."""

        def synchronize(self) -> None:
            super().synchronize()
            noted.append("waited")

        def mapped(self, memory: torch.Tensor) -> torch.Tensor:
            weakref.finalize(memory.untyped_storage(), noted.append, "freed")
            return super().mapped(memory)

    noted: list[str] = []
    engine = engine_with_host_share(Noting())
    decode(engine, ReferenceKernel())
    end(engine)
    del engine
    gc.collect()
    assert noted == ["waited", "freed"]


def test_a_query_is_kept_where_asking_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        device = SimulatedDevice(seed=seed)
        engine = engine_with_host_share(device)
        with monkeypatch.context() as patch:
            patch.setattr(device.host_work, "run", interrupt)
            with pytest.raises(KeyboardInterrupt):
                decode(engine, ReferenceKernel())
        decode(engine, ReferenceKernel())
        engine.close()
        device.memory.check()


def interrupt(_function: object) -> None:
    raise KeyboardInterrupt
