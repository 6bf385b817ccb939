"""Captures of the simulated device: they do again what was done, as a GPU's, and know no Python."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from headinfer.device.base import CaptureError
from headinfer.device.simulated import SimulatedDevice

MODES = [torch.no_grad, torch.inference_mode]


@pytest.fixture
def given() -> torch.Tensor:
    return torch.arange(6.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "work",
    [
        lambda given: given * 2 + 1,
        lambda given: given.view(2, 3).t().reshape(-1).softmax(0),
        lambda given: given[None].expand(4, 6).sum(1),
        lambda given: torch.stack((given, given)).add_(1).mul_(given),
        lambda given: torch.nn.functional.linear(given, torch.eye(6)[:3], torch.ones(3)),
        lambda given: given.sort(descending=True).values,
        lambda given: given.clone().masked_fill_(given > 2, 0.5),
        lambda given: torch.zeros(6).index_copy_(0, torch.tensor([5, 1]), given[:2]),
    ],
)
def test_a_replay_does_it_with_what_is_there_by_then(
    work: Callable[[torch.Tensor], torch.Tensor], mode: Callable[[], Any], given: torch.Tensor
) -> None:
    with mode():
        capture = SimulatedDevice().capture(lambda: work(given))
        for new in (torch.randn(6), torch.randn(6) + 3):
            given.copy_(new)
            assert torch.equal(capture.replay(), work(new))


def test_results_are_overwritten_by_the_next_replay(given: torch.Tensor) -> None:
    capture = SimulatedDevice().capture(lambda: {"sum": given.sum(), "same": given * 1})
    first = capture.replay()
    assert int(first["sum"]) == 15
    given.add_(1)
    assert capture.replay()["sum"] is first["sum"]
    assert (int(first["sum"]), first["same"].tolist()) == (21, given.tolist())


def test_nothing_of_python_runs_again(given: torch.Tensor) -> None:
    layer, calls = torch.nn.Linear(6, 2).requires_grad_(False), []

    def work() -> torch.Tensor:
        calls.append(1)
        return layer(given) * len(calls)

    wanted = layer(given)
    capture = SimulatedDevice().capture(work)
    layer.weight = torch.nn.Parameter(layer.weight * 7, False)
    layer.bias.data = layer.bias.data * 7
    assert torch.equal(capture.replay(), wanted)
    assert calls == [1]


def test_what_is_launched_runs_at_each_replay(given: torch.Tensor) -> None:
    device, out, at = SimulatedDevice(), torch.zeros(1), [0]

    def launched() -> None:
        out.copy_(given[at[0]])
        at[0] += given.argmax().item() // 5  # which only it may read

    def work() -> torch.Tensor:
        device.launch(launched)
        return out + 10

    device.launch(launched)
    assert at == [1]
    capture = device.capture(work)
    assert [int(capture.replay()) for _ in range(3)] == [12, 13, 14]
    assert at == [5]


READ_BACK: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda given: given[0].item(),
    "bool": lambda given: bool(given.any()),
    "int": lambda given: int(given[0]),
    "nonzero": lambda given: given.nonzero(),
    "where": lambda given: torch.where(given > 1),
    "mask": lambda given: given[given > 1],
    "masked_select": lambda given: given.masked_select(given > 1),
    "unique": lambda given: given.unique(),
    "unique_consecutive": lambda given: given.unique_consecutive(),
    "bincount": lambda given: given.long().bincount(),
    "allclose": lambda given: torch.allclose(given, given),
    "tolist": lambda given: given.tolist(),
    "numpy": lambda given: given.numpy(),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("work", READ_BACK.values(), ids=READ_BACK)
def test_reading_back_is_refused(
    work: Callable[[torch.Tensor], Any], mode: Callable[[], Any], given: torch.Tensor
) -> None:
    with mode():
        device = SimulatedDevice()
        with pytest.raises(CaptureError, match="it reads back"):
            device.capture(lambda: work(given))
        work(given)  # as before
        assert int(device.capture(lambda: given.sum()).replay()) == 15


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_within_leaves_the_device_as_before(
    error: type[BaseException], given: torch.Tensor
) -> None:
    device, calls = SimulatedDevice(), []

    def work() -> None:
        device.launch(lambda: calls.append(int(given[3])))
        raise error

    with pytest.raises(error):
        device.capture(work)
    device.launch(lambda: calls.append(1))
    assert (calls, given.tolist()[3]) == ([3, 1], 3)
