"""Captures of several streams on the simulated device, and flags between them and the host."""

from collections.abc import Callable

import pytest
import torch

from headinfer.device.base import Capture, CaptureError, Edge, PlaceError, Stream
from headinfer.device.cpu import CpuDevice
from headinfer.device.hazards import HazardError
from headinfer.device.simulated import SimulatedDevice

SEEDS = range(8)


def memory(device: SimulatedDevice, *, host: bool) -> torch.Tensor:
    """Return 4 floats, which the host was the last to write where they are its own."""
    taken = device.host_empty(16) if host else device.device_empty(16)
    device.finish_compute()
    tensor = taken.view(torch.float32)
    if host:
        device.host_access(tensor, write=True, purpose="set-up")
        tensor.fill_(1.0)
    return tensor


def fetched(device: SimulatedDevice, there: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """Copy to the device on copy-in, and return a sum of compute's."""
    device.copy_in.wait(device.compute.record(), Edge.TILE_FREE)
    device.copy_in.copy(there, here)
    device.compute.wait(device.copy_in.record(), Edge.TILE_FILLED)
    device.compute.reads(there, "the sum")
    return there.sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_replay_copies_what_is_there_by_then(seed: int) -> None:
    device = SimulatedDevice(seed=seed)
    here, there = memory(device, host=True), memory(device, host=False)
    capture = device.capture(lambda: fetched(device, there, here))
    assert there.isnan().all()  # nothing was copied yet
    for value in (2.0, 3.0):
        device.synchronize()
        device.host_access(here, write=True, purpose="test")
        here.fill_(value)
        assert float(capture.replay()) == 4 * value


def twice(capture: Capture[object]) -> None:
    for _ in range(2):
        capture.replay()


def without_a_wait(device: SimulatedDevice) -> None:
    device.copy_in.copy(memory(device, host=False), memory(device, host=True))


def after_an_old_event(device: SimulatedDevice, event: object) -> None:
    device.compute.wait(event, Edge.TILE_FILLED)  # type: ignore[arg-type]  # any event


def test_a_stream_that_did_not_join_is_refused() -> None:
    device = SimulatedDevice()
    with pytest.raises(CaptureError, match="takes no part"):
        device.capture(lambda: without_a_wait(device))


def test_a_wait_for_what_was_before_is_refused() -> None:
    device = SimulatedDevice()
    event = device.copy_out.record()
    with pytest.raises(CaptureError, match="enqueued before"):
        device.capture(lambda: after_an_old_event(device, event))


def test_an_end_that_does_not_wait_for_all_is_refused() -> None:
    device = SimulatedDevice()
    here, there = memory(device, host=True), memory(device, host=False)

    def work() -> None:
        fetched(device, there, here)
        device.copy_in.copy(there, here)

    with pytest.raises(CaptureError, match="does not wait for all"):
        device.capture(work)
    assert float(device.capture(lambda: fetched(device, there, here)).replay()) == 4.0


def test_the_host_can_wait_for_nothing_within() -> None:
    device = SimulatedDevice()
    with pytest.raises(CaptureError, match="waits for the device"):
        device.capture(lambda: device.compute.record().synchronize(Edge.HOST_SETTLED))


@pytest.mark.parametrize("edge", [Edge.TILE_FREE, Edge.TILE_FILLED])
def test_a_missing_wait_within_is_found_in_replays(edge: Edge) -> None:
    device = SimulatedDevice()
    here, there = memory(device, host=True), memory(device, host=False)
    capture = device.capture(lambda: fetched(device, there, here))
    capture.replay()
    device.skipped_edges = frozenset({edge})
    with pytest.raises(HazardError, match="in a graph"):
        twice(capture)


@pytest.mark.parametrize("before", [True, False])
def test_a_graphs_part_of_a_stream_is_in_no_order_with_the_stream(before: bool) -> None:
    """Though both are called copy-in: compute must wait before it, and copy-in after it."""
    device = SimulatedDevice()
    here, there = memory(device, host=True), memory(device, host=False)
    capture = device.capture(lambda: fetched(device, there, here))
    work = [capture.replay, lambda: device.copy_in.copy(there, here)]
    first, second = reversed(work) if before else work
    first()
    with pytest.raises(HazardError, match="on copy-in"):
        second()


class Adding:
    """A server's task: adds one to a number."""

    def __init__(self, number: torch.Tensor) -> None:
        self.number = number

    def __call__(self) -> None:
        self.number.add_(1)

    def state_accesses(self, stream: Stream) -> None:
        stream.writes(self.number, "adding")


class Server:
    """Two tasks, each with a number of its own."""

    def __init__(self, device: SimulatedDevice) -> None:
        flags = device.host_empty(32).zero_().view(torch.int64).view(2, 2)
        self.asks, self.answers = flags
        self.numbers = [memory(device, host=True) for _ in range(2)]
        self.tasks = [Adding(number) for number in self.numbers]

    def begin(self) -> None:
        raise AssertionError("the simulation has no thread")


def asked(device: SimulatedDevice, server: Server, order: tuple[int, ...] = (0, 1)) -> torch.Tensor:
    """Have the server do its tasks in a step, and return what it has added."""
    stream = device.host_work
    stream.wait(device.compute.record(), Edge.QUERY_READY)
    for index in order:
        stream.raise_flag(server.asks[index : index + 1])
        stream.await_flag(server.answers[index : index + 1], Edge.SERVED)
        stream.lower_flag(server.answers[index : index + 1])
    device.compute.wait(stream.record(), Edge.ANSWERED)
    for number in server.numbers:
        device.compute.reads(number, "the sum")
    return torch.stack(server.numbers).sum(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_flags_are_answered_in_each_replay(seed: int) -> None:
    device = SimulatedDevice(seed=seed)
    server = Server(device)
    device.serve(server)
    capture = device.capture(lambda: asked(device, server))
    for replay in range(1, 4):
        assert capture.replay().tolist() == 2 * [4.0 * (1 + replay)]
        assert not server.asks.any()
        assert not server.answers.any()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda patch, stream: patch.setattr(stream, "lower_flag", lambda _flag: None), "adding"),
        (lambda patch, stream: patch.setattr(stream, "raise_flag", lambda _flag: None), "nobody"),
    ],
    ids=["left up", "never raised"],
)
def test_a_flag_that_is_not_as_it_should_be_is_found(
    spoil: Callable[[pytest.MonkeyPatch, Stream], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = SimulatedDevice()
    server = Server(device)
    device.serve(server)
    spoil(monkeypatch, device.host_work)
    capture = device.capture(lambda: asked(device, server))
    with pytest.raises(HazardError, match=message):
        twice(capture)


def test_a_flag_out_of_turn_is_found() -> None:
    device = SimulatedDevice()
    server = Server(device)
    device.serve(server)
    capture = device.capture(lambda: asked(device, server, (1, 0)))
    with pytest.raises(HazardError, match="looks at another one"):
        capture.replay()


def test_the_cpu_has_no_server() -> None:
    with pytest.raises(PlaceError, match="has no streams"):
        CpuDevice().serve(Server(SimulatedDevice()))
