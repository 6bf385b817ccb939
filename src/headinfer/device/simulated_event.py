"""Points in the work of simulated streams, which hold the clocks of what is before them."""

from typing import TYPE_CHECKING

from headinfer.device.base import CaptureError, Edge, Event
from headinfer.device.hazards import Clock, abroad, join

if TYPE_CHECKING:
    from headinfer.device.simulated import SimulatedDevice
    from headinfer.device.simulated_stream import SimulatedStream


class SimulatedEvent:
    """A point in a simulated stream."""

    def __init__(self, stream: "SimulatedStream") -> None:
        self._stream = stream
        self.position = stream.enqueued
        self.clock: Clock = dict(stream.clock)
        self.moment: int | None = None  # of a timed event, once it was reached

    @property
    def reached(self) -> bool:
        """Whether all work before the event has run."""
        return self._stream.executed >= self.position

    def clock_on(self, device: "SimulatedDevice") -> Clock:
        """Return what is before it, as a device counts that need not be the stream's."""
        here = self._stream.device
        return self.clock if device is here else abroad(self.clock, here.number, device.number)

    def synchronize(self, edge: Edge) -> None:
        """Run the stream up to the event and order the host after it."""
        device = self._stream.device
        device.check_usable()
        if edge in device.skipped_edges:
            return
        device.exercised_edges.add(edge)
        self.force()
        join(device.host_clock, self.clock)

    def seconds_to(self, other: Event) -> float | None:
        """Compare the order in which the two were reached: a microsecond for each thing done."""
        assert isinstance(other, SimulatedEvent)
        if self.moment is None or other.moment is None:
            return None
        return 1e-6 * (other.moment - self.moment)

    def force(self) -> None:
        """Run the stream up to the event, and whatever it waits for."""
        while not self.reached:
            self._stream.step(force=True)


class RecordedEvent:
    """A point in a stream's part of a capture: another event in each replay.

    Args:
        stream: that it was recorded on.

    Attributes:
        stream: that it was recorded on.
        now: of the replay under way.
    """

    reached = False
    now: Event

    def __init__(self, stream: "SimulatedStream") -> None:
        self.stream = stream

    def synchronize(self, edge: Edge) -> None:
        """Raise: the host cannot wait for it.

        Raises:
            CaptureError: always.
        """
        raise CaptureError("it waits for the device")

    def seconds_to(self, other: Event) -> float | None:
        """Return None: nobody knows."""
        return None
