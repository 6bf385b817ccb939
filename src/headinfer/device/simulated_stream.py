"""Streams of the simulated device: queues that run as early, or as late, as their waits allow.

What is enqueued during a capture is noted, and enqueued anew in each replay. That goes to a twin of
the stream: a graph's part of a stream is in no order with what is enqueued there otherwise.
"""

import collections
import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.profiler import record_function

from headinfer.device.base import CaptureError, Edge, Event
from headinfer.device.hazards import Clock, join
from headinfer.device.host_calls import without_collection
from headinfer.device.simulated_event import RecordedEvent, SimulatedEvent
from headinfer.device.strips import contiguous_pieces

if TYPE_CHECKING:
    from headinfer.device.simulated import SimulatedDevice

COPY_MARK = "headinfer copy: "
"""What a profiler shows around a copy, before the stream's name."""

HOST_CALL_MARK = "headinfer: host function"
"""What a profiler shows around the call of a host function."""

IN_GRAPH = " in a graph"
"""Ends the name of a stream that has another one's part of captures."""

_UNMARKED = contextlib.nullcontext()


def _mark(name: str) -> contextlib.AbstractContextManager[object]:
    """Mark what is done within, if a profiler looks on: a mark takes longer than a small copy."""
    return record_function(name) if torch._C._autograd._profiler_enabled() else _UNMARKED


class SimulatedStream:
    """A queue. The compute stream is `eager`: what is enqueued by other means ran at once.

    Args:
        device: whose it is.
        name: of the stream.
        eager: whether work runs when it is enqueued.
        twin: has this stream's part of captures; None for itself.
    """

    def __init__(
        self,
        device: "SimulatedDevice",
        name: str,
        *,
        eager: bool,
        twin: "SimulatedStream | None" = None,
    ) -> None:
        self.device = device
        self.name = name
        self.clock: Clock = {}
        self.enqueued = 0
        self._eager = eager
        self._twin = twin or self
        self._queue: collections.deque[Callable[[bool], bool]] = collections.deque()

    def _noted(self, work: Callable[["SimulatedStream"], object]) -> bool:
        """Note what is enqueued where a capture is under way; return whether one is."""
        recorder = self.device.recorder
        if recorder is None or recorder.in_launch:
            return False
        twin = self._twin
        recorder.note_enqueued(self, lambda: work(twin))
        return True

    @property
    def executed(self) -> int:
        """Work that has run; not counted on its own, or Ctrl-C could leave the two at odds."""
        return self.enqueued - len(self._queue)

    def _tick(self) -> None:
        """Start an operation: it follows all before it here, and what the host did before it."""
        self.device.check_usable()
        self.device.memory.check()
        join(self.clock, self.device.host_clock)
        self.clock[self.name] = self.clock.get(self.name, 0) + 1

    def _enqueue(self, work: Callable[[bool], bool]) -> None:
        self._queue.append(work)
        self.enqueued += 1
        self.device.run_some()

    def step(self, *, force: bool) -> bool:
        """Run the head of the queue; False when there is none or it waits for another stream."""
        if not self._queue or not self._queue[0](force):
            return False
        self._queue.popleft()
        return True

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy piece by piece, and check each against all accesses so far.

        On compute it runs at once.
        """
        assert destination.shape == source.shape
        assert destination.dtype == source.dtype
        if self._noted(lambda twin: twin.copy(destination, source)):
            return
        for to, piece in contiguous_pieces(destination, source):
            self._copy_piece(to, piece)

    def copy_tokens(
        self,
        destination: Sequence[torch.Tensor],
        at: int,
        source: Sequence[torch.Tensor],
        first: int,
        tokens: int,
    ) -> None:
        """Queue the copy of each tensor's tokens; see `Stream.copy_tokens`."""
        for to, start in zip(destination, source, strict=True):
            assert to.is_contiguous()
            assert start.is_contiguous()
            self.copy(to.narrow(2, at, tokens), start.narrow(2, first, tokens))

    def _copy_piece(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._tick()
        purpose = f"copy of {tuple(source.shape)} as operation {self.clock[self.name]}"
        self.device.memory.access(source, self.clock, self.name, False, purpose)
        self.device.memory.access(destination, self.clock, self.name, True, purpose)

        if self._eager:
            destination.copy_(source)
            return

        # As on a device, a copy does not keep the memory of its ends from the next owner.
        addresses = destination.data_ptr(), source.data_ptr(), source.nbytes
        holds = self.device.memory.blocks.hold
        kept = [end for end in (destination, source) if not holds(end)]

        def work(_force: bool, _kept: list[torch.Tensor] = kept) -> bool:
            with _mark(f"{COPY_MARK}{self.name.removesuffix(IN_GRAPH)}"):
                ctypes.memmove(*addresses)
            return True

        self._enqueue(work)

    def run(self, function: Callable[[], None]) -> None:
        """Queue a call; what it accesses must be stated by `reads` and `writes`."""
        assert not self._eager, "host functions have a stream of their own"
        if self._noted(lambda twin: twin.run(function)):
            return
        self._tick()

        def work(_force: bool) -> bool:
            with _mark(HOST_CALL_MARK), self.device.calling(), without_collection():
                function()
            return True

        self._enqueue(work)

    def record(self, *, timed: bool = False) -> Event:
        """Return an event after all work enqueued so far."""
        self.device.check_usable()
        recorded = RecordedEvent(self)
        if self._noted(lambda twin: setattr(recorded, "now", twin.record())):
            return recorded
        event = SimulatedEvent(self)
        if not timed:
            return event

        def work(_force: bool) -> bool:
            event.moment = next(self.device.moments)
            return True

        if self._eager:
            work(True)
        else:
            event.position += 1  # taking the time is work, too
            self._enqueue(work)
        return event

    def wait(self, event: Event, edge: Edge) -> None:
        """Order later work after `event`; a queue then stops there, compute runs up to it.

        Raises:
            CaptureError: it is captured, and the event is from before.
        """
        recorder = self.device.recorder
        if recorder is not None and not recorder.in_launch:
            if not isinstance(event, RecordedEvent):
                raise CaptureError("it waits for what was enqueued before")
            recorder.join(self, event.stream)
            self._noted(lambda twin: twin.wait(event.now, edge))
            return
        assert isinstance(event, SimulatedEvent)
        self.device.check_usable()
        if edge in self.device.skipped_edges:
            return
        self.device.exercised_edges.add(edge)
        join(self.clock, event.clock_on(self.device))
        if self._eager:
            event.force()
            return

        def work(force: bool) -> bool:
            if force:
                event.force()
            return event.reached

        self._enqueue(work)

    def raise_flag(self, flag: torch.Tensor) -> None:
        """Queue it, and let who serves the flag do its task; see `SimulatedFlags`."""
        if not self._noted(lambda twin: twin.raise_flag(flag)):
            self._set_flag(flag, 1)
            self.device.flags.raised(flag, self)

    def lower_flag(self, flag: torch.Tensor) -> None:
        """Queue it."""
        if not self._noted(lambda twin: twin.lower_flag(flag)):
            self._set_flag(flag, 0)
            self.device.flags.lowered(flag)

    def _set_flag(self, flag: torch.Tensor, value: int) -> None:
        self._tick()

        def work(_force: bool) -> bool:
            flag.fill_(value)
            return True

        self._queue_or_do(work)

    def await_flag(self, flag: torch.Tensor, edge: Edge) -> None:
        """Order later work after the raising that a flag is up by; the queue stops till it is."""
        if self._noted(lambda twin: twin.await_flag(flag, edge)):
            return
        self.device.check_usable()
        if edge in self.device.skipped_edges:
            return
        self.device.exercised_edges.add(edge)
        raising = self.device.flags.raising(flag)
        join(self.clock, raising.clock)

        def work(force: bool) -> bool:
            if force:
                raising.force()
            return bool(flag.item())

        self._queue_or_do(work)

    def serve(self, asked: SimulatedEvent, serve: Callable[[], None]) -> None:
        """Queue what a server does once a flag was raised: not in a stream's order but its own."""

        def work(force: bool) -> bool:
            if force:
                asked.force()
            if not asked.reached:
                return False
            with _mark(HOST_CALL_MARK), self.device.calling(), without_collection():
                serve()
            return True

        self._enqueue(work)

    def _queue_or_do(self, work: Callable[[bool], bool]) -> None:
        if self._eager:
            assert work(True), "compute would wait for ever"
        else:
            self._enqueue(work)

    def reads(self, tensor: torch.Tensor, purpose: str) -> None:
        """Check a read by work enqueued by other means."""
        if not self._noted(lambda twin: twin.reads(tensor, purpose)):
            self._access(tensor, False, purpose)

    def writes(self, tensor: torch.Tensor, purpose: str) -> None:
        """Check a write by work enqueued by other means."""
        if not self._noted(lambda twin: twin.writes(tensor, purpose)):
            self._access(tensor, True, purpose)

    def _access(self, tensor: torch.Tensor, write: bool, purpose: str) -> None:
        self._tick()
        for piece, _ in contiguous_pieces(tensor, tensor):
            self.device.memory.access(piece, self.clock, self.name, write, purpose)
