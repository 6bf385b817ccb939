"""The garbage collector rests while a host function runs, and only if it was on."""

import gc

import pytest

from headinfer.device import cuda_calls
from headinfer.device.host_calls import without_collection
from headinfer.device.simulated import SimulatedDevice


def test_collection_rests_and_goes_on() -> None:
    with without_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_collection_goes_on_after_an_error() -> None:
    with pytest.raises(ArithmeticError), without_collection():
        raise ArithmeticError
    assert gc.isenabled()


def test_collection_rests_in_host_functions() -> None:
    seen: list[bool] = []
    device = SimulatedDevice()
    device.host_work.run(lambda: seen.append(gc.isenabled()))
    device.synchronize()
    cuda_calls._room.acquire()
    cuda_calls._pending[-1] = lambda: seen.append(gc.isenabled())
    cuda_calls._call(-1)
    assert seen == [False, False]
