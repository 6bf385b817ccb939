"""When each of several devices works on a prompt, whose chunks follow each other through them."""

import contextlib
from collections.abc import Iterator, Sequence

from headinfer.device.base import Device, Event


class BusyTimes:
    """A watch on the devices that a prompt's chunks pass through.

    A device works from its first layer's attention until the chunk comes to another one, or ends.
    So its norm and projections before that attention are left out. Only the thread that calls the
    model may use it.

    Args:
        devices: in the order in which layers come to them; one alone is not watched.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = tuple(devices)
        self._at: tuple[Device, Event] | None = None
        self._worked: list[tuple[Device, Event, Event]] = []

    def begin(self, device: Device) -> None:
        """Note that a chunk's layer is about to be attended on a device."""
        if len(self._devices) == 1 or (self._at is not None and self._at[0] is device):
            return
        self.pause()
        self._at = device, _now(device)

    def pause(self) -> None:
        """Note that the chunk leaves the device where it is, whose work is all enqueued."""
        if self._at is not None:
            device, began = self._at
            self._at = None
            self._worked.append((device, began, _now(device)))

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Watch other calls until the `with` statement ends, and forget what they leave."""
        self.pause()
        worked = self._worked
        self._worked = []
        try:
            yield
        finally:
            self._at, self._worked = None, worked

    def take(self) -> tuple[float, ...]:
        """Return the seconds of each device since the last time, and forget them; once all is done.

        Returns:
            No times for a single device, and where devices have none.
        """
        self.pause()
        worked, self._worked = self._worked, []
        seconds = dict.fromkeys(self._devices, 0.0)
        for device, began, ended in worked:
            took_s = began.seconds_to(ended)
            if took_s is None:
                return ()
            seconds[device] += took_s
        return tuple(seconds.values()) if worked else ()


def _now(device: Device) -> Event:
    with device.in_use():
        return device.compute.record(timed=True)
