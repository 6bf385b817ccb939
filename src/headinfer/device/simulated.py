"""A device that runs on the CPU, has memory of its own, and copies at the worst possible time.

Work on the compute stream runs when it is enqueued, as the model's own operations do. Copies and
calls of host functions are queued, and run in a seeded random order. They run as early as their
stream allows or as late as the waits on them allow. A read that nothing orders after its copy finds
garbage.

Independently of when things ran, every access is checked by vector clocks (`hazards`). So a missing
wait is an error even where chance let the copy run in time.

`simulated_memory` does the same for memory that is handed out, and for memory that is freed.
"""

import collections
import contextlib
import ctypes
import itertools
import random
from collections.abc import Callable, Collection, Iterator
from typing import TypeAlias, TypeVar

import torch
from torch.profiler import record_function

from headinfer.device.base import Capture, Edge, Event, Mark, ReachedMark, Stream
from headinfer.device.hazards import Clock, join
from headinfer.device.host_calls import without_collection
from headinfer.device.simulated_capture import Recorder, SimulatedCapture
from headinfer.device.simulated_memory import SimulatedMemory
from headinfer.device.strips import contiguous_pieces

_Step: TypeAlias = Callable[[], bool]
"""Work at the head of a queue; returns False when it must wait for another stream."""

COPY_MARK = "headinfer copy: "
"""What a profiler shows around a copy, before the stream's name."""

HOST_CALL_MARK = "headinfer: host function"
"""What a profiler shows around the call of a host function."""

_HOST = "host"

_Result = TypeVar("_Result")


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


class SimulatedStream:
    """A queue. The compute stream is `eager`: what is enqueued by other means ran at once."""

    def __init__(self, device: "SimulatedDevice", name: str, *, eager: bool) -> None:
        self.device = device
        self.name = name
        self.clock: Clock = {}
        self.enqueued = 0
        self._eager = eager
        self._queue: collections.deque[Callable[[bool], bool]] = collections.deque()

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
        for to, piece in contiguous_pieces(destination, source):
            self._copy_piece(to, piece)

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
            with record_function(f"{COPY_MARK}{self.name}"):
                ctypes.memmove(*addresses)
            return True

        self._enqueue(work)

    def run(self, function: Callable[[], None]) -> None:
        """Queue a call; what it accesses must be stated by `reads` and `writes`."""
        assert not self._eager, "host functions have a stream of their own"
        self._tick()

        def work(_force: bool) -> bool:
            with record_function(HOST_CALL_MARK), self.device.calling(), without_collection():
                function()
            return True

        self._enqueue(work)

    def record(self, *, timed: bool = False) -> Event:
        """Return an event after all work enqueued so far."""
        self.device.check_usable()
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
        """Order later work after `event`; a queue then stops there, compute runs up to it."""
        assert isinstance(event, SimulatedEvent)
        self.device.check_usable()
        if edge in self.device.skipped_edges:
            return
        self.device.exercised_edges.add(edge)
        join(self.clock, event.clock)
        if self._eager:
            event.force()
            return

        def work(force: bool) -> bool:
            if force:
                event.force()
            return event.reached

        self._enqueue(work)

    def reads(self, tensor: torch.Tensor, purpose: str) -> None:
        """Check a read by work enqueued by other means."""
        self._access(tensor, False, purpose)

    def writes(self, tensor: torch.Tensor, purpose: str) -> None:
        """Check a write by work enqueued by other means."""
        self._access(tensor, True, purpose)

    def _access(self, tensor: torch.Tensor, write: bool, purpose: str) -> None:
        self._tick()
        for piece, _ in contiguous_pieces(tensor, tensor):
            self.device.memory.access(piece, self.clock, self.name, write, purpose)


class SimulatedDevice:
    """A simulated device, the one behind `--device simulated`.

    Args:
        seed: of the order in which queued work runs.
        skip: waits to leave out, to show that the checks notice.

    Attributes:
        memory: of the host and of the device, with all accesses.
        exercised_edges: the kinds of wait seen so far.
    """

    name = "simulated"
    tiles_are_views = False
    checks_accesses = True
    captures = True
    torch_device = torch.device("cpu")

    def __init__(self, *, seed: int = 0, skip: Collection[Edge] = ()) -> None:
        self.host_clock: Clock = {}
        self.skipped_edges = frozenset(skip)
        self.exercised_edges: set[Edge] = set()
        self._random = random.Random(seed)
        self._compute = SimulatedStream(self, "compute", eager=True)
        self._copy_in = SimulatedStream(self, "copy-in", eager=False)
        self._copy_out = SimulatedStream(self, "copy-out", eager=False)
        self._host_work = SimulatedStream(self, "host-work", eager=False)
        self._queues = (self._copy_in, self._copy_out, self._host_work)
        self.compute: Stream = self._compute
        self.copy_in: Stream = self._copy_in
        self.copy_out: Stream = self._copy_out
        self.host_work: Stream = self._host_work
        self.moments = itertools.count()
        self._in_host_function = False
        self._recorder: Recorder | None = None  # during a capture
        self.memory = SimulatedMemory(compute=self._compute.clock, host=self.host_clock)

    @property
    def allocated_bytes(self) -> int:
        """Device memory now allocated."""
        return self.memory.blocks.allocated_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that was ever allocated."""
        return self.memory.blocks.peak_bytes

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Refuse all use of the device until a host function is done."""
        self._in_host_function = True
        try:
            yield
        finally:
            self._in_host_function = False

    def check_usable(self) -> None:
        """Notice the use of the device by a host function, where a real driver may hang."""
        assert not self._in_host_function, "a host function must not use the device"

    def run_some(self) -> None:
        """Run a random part of what is queued: often nothing, so that copies are often late."""
        for _ in range(self._random.choice((0, 0, 1, 4))):
            self._random.choice(self._queues).step(force=False)

    def host_empty(self, num_bytes: int) -> torch.Tensor:
        """Return host memory, poisoned so that a read before a write shows as NaN."""
        return self.memory.host_empty(num_bytes)

    def device_empty(self, num_bytes: int) -> torch.Tensor:
        """Return memory of the simulated device, poisoned with NaN too, and account for it."""
        tensor = self.memory.device_empty(num_bytes)
        self._compute.writes(tensor, "what had this memory before")
        return tensor

    def mapped(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the memory itself; that compute reads it must be stated."""
        return memory

    def host_access(self, tensor: torch.Tensor, *, write: bool, purpose: str) -> None:
        """Check an access by the host itself."""
        self.host_clock[_HOST] = self.host_clock.get(_HOST, 0) + 1
        self.memory.access(tensor, self.host_clock, _HOST, write, purpose)

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: compute is one stream, whoever uses it."""
        return contextlib.nullcontext()

    def capture(self, work: Callable[[], _Result]) -> Capture[_Result]:
        """Record a function's operations, which run once meanwhile; see `SimulatedCapture`."""
        self._recorder = Recorder()
        try:
            return SimulatedCapture(work, self._recorder)
        finally:
            self._recorder = None

    def launch(self, work: Callable[[], None]) -> None:
        """Call a function now, and at each replay."""
        if self._recorder is None:
            work()
        else:
            self._recorder.launch(work)

    def aside(self, work: Callable[[], None]) -> None:
        """Call a function now, or at each replay of what is being captured."""
        if self._recorder is None:
            work()
        else:
            self._recorder.aside(work)

    def free_bytes(self) -> int | None:
        """Return None: device memory is host memory."""
        return None

    def mark_compute(self) -> Mark:
        """Return a mark that is reached: compute's work ran when it was enqueued."""
        return ReachedMark()

    def finish_compute(self) -> None:
        """Order the host after the compute stream, whose work ran when it was enqueued."""
        join(self.host_clock, self._compute.clock)

    def synchronize(self) -> None:
        """Run everything and order the host after it."""
        for stream in (*self._queues, self._compute):
            event = SimulatedEvent(stream)
            event.force()
            join(self.host_clock, event.clock)
