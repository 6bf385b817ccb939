"""A device that runs on the CPU, has memory of its own, and copies at the worst possible time.

Work on the compute stream runs when it is enqueued, as the model's own operations do. Copies and
calls of host functions are queued, and run in a seeded random order. They run as early as their
stream allows or as late as the waits on them allow. A read that nothing orders after its copy finds
garbage.

Independently of when things ran, every access is checked by vector clocks (`hazards`). So a missing
wait is an error even where chance let the copy run in time.

`simulated_memory` does the same for memory that is handed out, and for memory that is freed.
"""

import contextlib
import itertools
import random
from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

import torch

from headinfer.device.base import Capture, Device, Edge, Mark, Server, Stream
from headinfer.device.hazards import Clock, join
from headinfer.device.host_ahead import HostMemory
from headinfer.device.marks import ReachedMark
from headinfer.device.simulated_capture import Recorder, SimulatedCapture, SimulatedLaunches
from headinfer.device.simulated_event import SimulatedEvent
from headinfer.device.simulated_flags import SimulatedFlags
from headinfer.device.simulated_memory import LateMemory, SimulatedMemory
from headinfer.device.simulated_stream import IN_GRAPH, SimulatedStream
from headinfer.device.together import Together

_HOST = "host"

_numbers = itertools.count()

_Result = TypeVar("_Result")


class SimulatedDevice:
    """A simulated device, the one behind `--device simulated`.

    Args:
        seed: of the order in which queued work runs.
        skip: waits to leave out, to show that the checks notice.
        host_piece_bytes: host memory that is got at a time, and as late as may be; None for all.
        packs_fast: as of other devices; else tokens are packed where that is asked for alone.

    Attributes:
        memory: of the host and of the device, with all accesses.
        exercised_edges: the kinds of wait seen so far.
        flags: what streams raise, lower and await.
        number: tells its clocks from those of other devices.
        recorder: of the capture under way; None for none.
        moments: gives a number to each timed event that was reached.
    """

    name = "simulated"
    tiles_are_views = False
    checks_accesses = True
    captures = True
    spare_host_bytes = 0
    torch_device = torch.device("cpu")

    def __init__(
        self,
        *,
        seed: int = 0,
        skip: Collection[Edge] = (),
        host_piece_bytes: int | None = None,
        packs_fast: bool = False,
    ) -> None:
        self.host_piece_bytes, self.packs_fast = host_piece_bytes, packs_fast
        self.number = next(_numbers)
        self.host_clock: Clock = {}
        self.skipped_edges = frozenset(skip)
        self.exercised_edges: set[Edge] = set()
        self._random = random.Random(seed)
        self._compute = SimulatedStream(self, "compute", eager=True)
        self._compute_in_graph = SimulatedStream(self, f"compute{IN_GRAPH}", eager=True)
        names = ("copy-in", "copy-out", "host-work")
        twins = [SimulatedStream(self, f"{name}{IN_GRAPH}", eager=False) for name in names]
        queues = [
            SimulatedStream(self, name, eager=False, twin=twin)
            for name, twin in zip(names, twins, strict=True)
        ]
        self.compute: Stream = self._compute
        self.copy_in, self.copy_out, self.host_work = queues
        self.flags = SimulatedFlags(self)
        self._queues = (*queues, *twins, self.flags.stream)
        self.moments = itertools.count()
        self._in_host_function = False
        self.recorder: Recorder | None = None
        self._launches: SimulatedLaunches | None = None  # of that capture
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

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: its streams are all its own."""
        return contextlib.nullcontext()

    def run_some(self) -> None:
        """Run a random part of what is queued: often nothing, so that copies are often late."""
        for _ in range(self._random.choice((0, 0, 1, 4))):
            self._random.choice(self._queues).step(force=False)

    def host_empty(self, num_bytes: int) -> torch.Tensor:
        """Return host memory, poisoned so that a read before a write shows as NaN."""
        return self.memory.host_empty(num_bytes)

    def host_ahead(self, num_bytes: int) -> HostMemory:
        """Return host memory that is got when it is asked for: as late as may be."""
        return LateMemory(lambda: self.host_empty(num_bytes))

    def keep_host_memory(self, spare_bytes: int, most_bytes: int | None) -> None:
        """Do nothing: memory that is freed is known as such."""

    def device_empty(self, num_bytes: int) -> torch.Tensor:
        """Return memory of the simulated device, poisoned with NaN too, and account for it."""
        tensor = self.memory.device_empty(num_bytes)
        self.compute.writes(tensor, "what had this memory before")
        return tensor

    def give_back_unused(self) -> None:
        """Do nothing: memory that is freed is known as such."""

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

    def capture(self, work: Callable[[], _Result], *beside: Device) -> Capture[_Result]:
        """Record a function's operations; see `SimulatedCapture`."""
        others = [device for device in beside if isinstance(device, SimulatedDevice)]
        assert len(others) == len(beside), "one kind of device captures"
        devices, launches = (self, *others), SimulatedLaunches(Together(self, others), others)
        with launches.launch():
            recorder = Recorder(device.compute for device in devices)
            try:
                for device in devices:
                    device.recorder, device._launches = recorder, launches
                return SimulatedCapture(work, recorder, launches)
            finally:
                for device in devices:
                    device.recorder = device._launches = None

    def move_compute(self, *, into_graph: bool) -> None:
        """Have compute be its part of a graph that another device launches, or what it was."""
        self.compute = self._compute_in_graph if into_graph else self._compute

    def launch(self, work: Callable[[], None]) -> None:
        """Call a function now, and at each replay."""
        if self.recorder is None:
            work()
        else:
            self.recorder.launch(work)

    def aside(self, work: Callable[[], None]) -> None:
        """Call a function now, or at each replay of what is being captured."""
        if self.recorder is None or self._launches is None:
            work()
        else:
            self.recorder.aside(self._launches.aside(work))

    def serve(self, server: Server) -> None:
        """Have its tasks done by work in a queue; its thread is not begun."""
        self.flags.serve(server)

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
        for stream in (*self._queues, self._compute, self._compute_in_graph):
            event = SimulatedEvent(stream)
            event.force()
            join(self.host_clock, event.clock)
