"""CUDA streams and events: those of torch, with copies and flags by the driver."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from headinfer.device import cuda_driver
from headinfer.device.base import Edge, Event, PlaceError
from headinfer.device.cuda_calls import enqueue_call
from headinfer.device.strips import contiguous_pieces, strips, token_strips


class CudaEvent:
    """A `torch.cuda.Event`, with timing where that is asked for."""

    def __init__(self, stream: torch.cuda.Stream, *, timed: bool) -> None:
        self._event = torch.cuda.Event(enable_timing=timed)
        self._event.record(stream)

    @property
    def reached(self) -> bool:
        """Whether all work before it is done."""
        return bool(self._event.query())

    def wait(self) -> None:
        """Block the host until the event is reached."""
        self._event.synchronize()

    def synchronize(self, edge: Edge) -> None:
        """Wait; edges are checked in simulation alone."""
        self.wait()

    def seconds_to(self, other: Event) -> float | None:
        """Compare the times at which the device reached the two."""
        assert isinstance(other, CudaEvent)
        if not (self.reached and other.reached):
            return None
        return float(self._event.elapsed_time(other._event)) / 1e3

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Make `stream` wait for the event."""
        stream.wait_event(self._event)


class CudaStream:
    """A stream; `None` stands for whichever stream is current when a method is called."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device_index = device.index  # torch takes ten times as long to find it by the device
        self._stream = stream

    def _current(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self._device_index)

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy; asynchronous because the host side is page-locked.

        torch's allocator need not know of the stream. Both sides' memory is the engine's own, or
        kept by it until compute was made to wait for the copy.
        """
        if torch.version.hip is None:
            cuda_driver.copy(self._current(), strips(destination, source))
            return
        with torch.cuda.stream(self._current()):
            for to, piece in contiguous_pieces(destination, source):
                to.copy_(piece, non_blocking=True)

    def copy_tokens(
        self,
        destination: Sequence[torch.Tensor],
        at: int,
        source: Sequence[torch.Tensor],
        first: int,
        tokens: int,
    ) -> None:
        """Enqueue copies, in one transfer where they lie alike; see `copy`."""
        if torch.version.hip is None:
            found = token_strips(destination, at, source, first, tokens)
            cuda_driver.copy(self._current(), found)
            return
        for to, start in zip(destination, source, strict=True):
            self.copy(to.narrow(2, at, tokens), start.narrow(2, first, tokens))

    def run(self, function: Callable[[], None]) -> None:
        """Enqueue a call on a thread of the driver's.

        Waits while too many others are pending, unless it is a `NativeFunction`.
        """
        with torch.cuda.device(self._device_index):
            enqueue_call(self._current(), function)

    def record(self, *, timed: bool = False) -> Event:
        """Return an event after all work enqueued so far."""
        return CudaEvent(self._current(), timed=timed)

    def wait(self, event: Event, edge: Edge) -> None:
        """Hold later work on this stream until `event`."""
        assert isinstance(event, CudaEvent)
        event.hold(self._current())

    def raise_flag(self, flag: torch.Tensor) -> None:
        """Have the driver write 1, once all before is done and can be seen by the host."""
        self._write_flag(flag, 1)

    def lower_flag(self, flag: torch.Tensor) -> None:
        """Have the driver write 0."""
        self._write_flag(flag, 0)

    def _write_flag(self, flag: torch.Tensor, value: int) -> None:
        with _flags_or_refused():
            cuda_driver.write_value(self._current(), flag.data_ptr(), value)

    def await_flag(self, flag: torch.Tensor, edge: Edge) -> None:
        """Have the driver wait for a 1; edges are checked in simulation alone."""
        with _flags_or_refused():
            cuda_driver.wait_value(self._current(), flag.data_ptr(), 1)

    def reads(self, tensor: torch.Tensor, purpose: str) -> None:
        """Do nothing: CUDA does not check."""

    def writes(self, tensor: torch.Tensor, purpose: str) -> None:
        """Do nothing: CUDA does not check."""


@contextlib.contextmanager
def _flags_or_refused() -> Iterator[None]:
    """Refuse what is captured in this form where the driver has no flags."""
    if torch.version.hip is not None:
        raise PlaceError("streams have no flags here")
    try:
        yield
    except RuntimeError as error:
        raise PlaceError("the driver refuses flags") from error
