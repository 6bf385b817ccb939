"""Captures in which two GPUs take part; run with `pytest -m gpu`."""

import gc
from collections.abc import Callable

import pytest
import torch

from headinfer.device.base import CaptureError
from headinfer.device.cuda import CudaDevice
from headinfer.device.together import all_apart

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs"),
]

_PLACE_BYTES = 2 * 2**20
"""More than torch gives from its memory for small tensors."""


@pytest.fixture
def devices() -> list[CudaDevice]:
    return [CudaDevice(torch.device("cuda", gpu)) for gpu in (0, 1)]


@pytest.fixture
def given() -> torch.Tensor:
    return torch.randn(256, 256, device="cuda:0")


def synchronize() -> None:
    for gpu in (0, 1):
        torch.cuda.synchronize(gpu)


def there_and_back(given: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return work that passes a tensor through both GPUs, twice."""
    weights = [torch.randn(256, 256, device=f"cuda:{gpu}") / 16 for gpu in (0, 1)]

    def work() -> torch.Tensor:
        state = given
        for gpu in (0, 1, 0, 1):
            state = state.to(f"cuda:{gpu}") @ weights[gpu] + 1
        return state.to("cuda:0") * 2

    return work


def fill_what_is_free(device: CudaDevice) -> list[torch.Tensor]:
    """Return memory that takes the place of whatever torch has free for captures, and more."""
    with torch.cuda.stream(device._apart):
        filled = [
            torch.full((_PLACE_BYTES,), 7, dtype=torch.uint8, device=device.torch_device)
            for _ in range(50)
        ] + [
            torch.full((2**10,), 7, dtype=torch.uint8, device=device.torch_device)
            for _ in range(2000)
        ]
    synchronize()
    return filled


def test_a_replay_is_the_work_of_both_and_touches_no_memory_of_others(
    devices: list[CudaDevice], given: torch.Tensor
) -> None:
    work = there_and_back(given)
    with all_apart(devices):
        work()
    capture = devices[0].capture(work, devices[1])
    others = [filled for device in devices for filled in fill_what_is_free(device)]
    for _ in range(5):
        given.copy_(torch.randn(256, 256))
        with all_apart(devices):
            wanted = work()
        assert torch.equal(capture.replay(), wanted)
    synchronize()
    assert all(bool((other == 7).all()) for other in others)


def test_either_device_may_launch_whichever_is_current(
    devices: list[CudaDevice], given: torch.Tensor
) -> None:
    work = there_and_back(given)
    with all_apart(devices):
        wanted = work()
    for current in (0, 1):
        with torch.cuda.device(current):
            captures = [devices[at].capture(work, devices[1 - at]) for at in (0, 1)]
            for capture in captures:
                assert torch.equal(capture.replay(), wanted)
            assert torch.cuda.current_device() == current


def test_what_comes_after_a_replay_waits_for_it_on_both(devices: list[CudaDevice]) -> None:
    first, second = (torch.zeros(2**24, device=f"cuda:{gpu}") for gpu in (0, 1))

    def work() -> None:
        for _ in range(50):
            first.add_(1)
            second.add_(1)

    with all_apart(devices):
        work()
    capture = devices[1].capture(work, devices[0])
    for count in (1, 2, 3):
        first.zero_(), second.zero_()
        for _ in range(count):
            capture.replay()
        assert [float(each.max()) for each in (first, second)] == [50 * count] * 2


def test_functions_are_called_between_the_pieces(
    devices: list[CudaDevice], given: torch.Tensor
) -> None:
    between, calls = torch.zeros(256, 256, device="cuda:1"), []

    def aside() -> None:
        calls.append(1)
        between.mul_(-1)

    def work() -> torch.Tensor:
        between.copy_(given @ given)
        with torch.cuda.device(1):
            devices[1].aside(aside)
        return between.to("cuda:0") + given

    with all_apart(devices):
        work()
    calls.clear()
    capture = devices[0].capture(work, devices[1])
    assert not calls
    for count in (1, 2, 3):
        given.copy_(torch.randn(256, 256))
        torch.testing.assert_close(capture.replay(), given - given @ given)
        assert len(calls) == count


@pytest.mark.parametrize("gpu", [0, 1])
def test_a_capture_that_fails_leaves_both_as_before(
    gpu: int, devices: list[CudaDevice], given: torch.Tensor
) -> None:
    work = there_and_back(given)

    def failing() -> torch.Tensor:
        work().to(f"cuda:{gpu}").sum().item()  # which waits for the device
        raise AssertionError("it was captured")

    with all_apart(devices):
        wanted = work()
    with pytest.raises(CaptureError):
        devices[0].capture(failing, devices[1])
    with pytest.raises(KeyError):
        devices[0].capture(lambda: [work(), {}["none"]], devices[1])
    with all_apart(devices):
        assert torch.equal(work(), wanted)
    assert torch.equal(devices[0].capture(work, devices[1]).replay(), wanted)
    synchronize()


def test_memory_of_captures_goes_with_them(devices: list[CudaDevice], given: torch.Tensor) -> None:
    def work() -> torch.Tensor:
        large = torch.zeros(2**26, device="cuda:1")
        return large.to("cuda:0").sum() + given.sum()

    with all_apart(devices):
        work()
    held = []
    for _ in range(4):
        capture = devices[0].capture(work, devices[1])
        capture.replay()
        synchronize()
        del capture
        gc.collect()
        torch.cuda.empty_cache()
        held.append([torch.cuda.memory_reserved(at) for at in (0, 1)])
    assert held[-1] == held[0]
    assert max(held[-1]) < 2**28
