"""Captures in which the compute streams of several devices take part, launched by one of them."""

import contextlib
from collections.abc import Iterator, Sequence

from headinfer.device.base import Device, Edge


class Together:
    """A device that launches captures, and those whose compute takes part in them.

    A launch comes after all that the devices did before, and before all that they do next. Within,
    they are in no order but what the captured work makes.

    Args:
        first: launches.
        others: take part.
    """

    def __init__(self, first: Device, others: Sequence[Device]) -> None:
        self.first = first
        self.others = tuple(others)

    def join(self) -> None:
        """Have compute of the first one wait for what the others' has enqueued by now."""
        for other in self.others:
            self.first.compute.wait(other.compute.record(), Edge.STEP_JOINED)

    def fork(self) -> None:
        """Have compute of the others wait for what the first one's has enqueued by now."""
        for other in self.others:
            other.compute.wait(self.first.compute.record(), Edge.STEP_FORKED)


@contextlib.contextmanager
def all_apart(devices: Sequence[Device]) -> Iterator[None]:
    """Have compute of each device be the stream that captures use; see `Device.apart`."""
    with contextlib.ExitStack() as apart:
        for device in reversed(devices):  # so that the first one is current within
            apart.enter_context(device.apart())
        yield
