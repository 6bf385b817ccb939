"""Flags of the simulated device: who raised them, and the servers that answer them.

A flag orders what awaits it after what raised it, and so the clocks are joined. One that is still
up from before lets pass at once: what comes then is ordered after the old raising alone. So a flag
that somebody forgot to lower is noticed by the accesses that it orders no more.
"""

import functools
import weakref
from typing import TYPE_CHECKING

import torch

from headinfer.device.base import Server
from headinfer.device.hazards import HazardError, join
from headinfer.device.simulated_event import SimulatedEvent
from headinfer.device.simulated_stream import SimulatedStream

if TYPE_CHECKING:
    from headinfer.device.simulated import SimulatedDevice


class SimulatedFlags:
    """A device's flags, and a stream in whose order servers work.

    Args:
        device: whose they are.

    Attributes:
        stream: of the servers' tasks.
    """

    def __init__(self, device: "SimulatedDevice") -> None:
        self.stream = SimulatedStream(device, "server", eager=False)
        self._raisings: dict[int, SimulatedEvent] = {}  # by address, of the flags that are up
        self._served: dict[int, tuple[weakref.ref[Server], int]] = {}
        self._next: weakref.WeakKeyDictionary[Server, int] = weakref.WeakKeyDictionary()

    def serve(self, server: Server) -> None:
        """Have a server do its tasks from now on; see `Device.serve`."""
        for index, flag in enumerate(server.asks):
            self._served[flag.data_ptr()] = weakref.ref(server), index

    def raised(self, flag: torch.Tensor, stream: SimulatedStream) -> None:
        """Note that the last work enqueued on a stream raises a flag."""
        raising = SimulatedEvent(stream)
        self._raisings.setdefault(flag.data_ptr(), raising)
        reference, index = self._served.get(flag.data_ptr(), (None, 0))
        server = reference() if reference is not None else None
        if server is not None:
            self._enqueue_task(server, index, raising)

    def lowered(self, flag: torch.Tensor) -> None:
        """Note that work just enqueued lowers a flag."""
        self._raisings.pop(flag.data_ptr(), None)

    def raising(self, flag: torch.Tensor) -> SimulatedEvent:
        """Return when a flag was raised by which it is up.

        Raises:
            HazardError: nobody raises it.
        """
        try:
            return self._raisings[flag.data_ptr()]
        except KeyError:
            raise HazardError("a flag is awaited that nobody raises") from None

    def _enqueue_task(self, server: Server, index: int, asked: SimulatedEvent) -> None:
        if self._next.get(server, 0) != index:
            raise HazardError(f"flag {index} is raised while the server looks at another one")
        self._next[server] = (index + 1) % len(server.asks)
        join(self.stream.clock, asked.clock)
        self.lowered(server.asks[index : index + 1])
        task = server.tasks[index]
        assert task is not None, "the server has no such task"
        task.state_accesses(self.stream)
        self.stream.serve(asked, functools.partial(_do, server, index))
        self.raised(server.answers[index : index + 1], self.stream)


def _do(server: Server, index: int) -> None:
    """Do what a server does when a flag is up."""
    assert server.asks[index], "the server was not asked"
    server.asks[index] = 0
    task = server.tasks[index]
    assert task is not None
    task()
    server.answers[index] = 1
