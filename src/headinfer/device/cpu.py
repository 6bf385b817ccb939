"""The CPU as device: host memory is device memory, so no copy and no stream exists."""

import contextlib
from collections.abc import Callable
from typing import NoReturn

import torch

from headinfer.device.base import CaptureError, Mark, PlaceError, Server
from headinfer.device.host_pages import map_host_memory
from headinfer.device.marks import ReachedMark


class CpuDevice:
    """A device whose tiles are views of the host store; its streams must never be asked for."""

    name = "cpu"
    tiles_are_views = True
    checks_accesses = False
    captures = False
    torch_device = torch.device("cpu")
    host_piece_bytes = None

    @property
    def compute(self) -> NoReturn:
        """Raise: nothing is asynchronous on the CPU."""
        raise AssertionError("the CPU device has no streams")

    copy_in = compute
    copy_out = compute
    host_work = compute

    def host_empty(self, num_bytes: int) -> torch.Tensor:
        """Return pageable memory; the system commits a page when it is first written."""
        return map_host_memory(num_bytes)

    def host_ahead(self, num_bytes: int) -> NoReturn:
        """Raise: memory is there at once."""
        raise AssertionError("the CPU device has nothing to get ahead")

    device_empty = host_empty

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: there is one."""
        return contextlib.nullcontext()

    def mapped(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the memory itself."""
        return memory

    def host_access(self, tensor: torch.Tensor, *, write: bool, purpose: str) -> None:
        """Do nothing: all work is done when its call returns."""

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: there is no stream."""
        return contextlib.nullcontext()

    def capture(self, work: Callable[[], object], *beside: object) -> NoReturn:
        """Raise: a call of the CPU's is no launch."""
        raise CaptureError("the CPU launches nothing")

    def launch(self, work: Callable[[], None]) -> None:
        """Run it."""
        work()

    def aside(self, work: Callable[[], None]) -> None:
        """Call it: nothing is ever captured."""
        work()

    def serve(self, server: Server) -> NoReturn:
        """Raise: nothing is ever captured."""
        raise PlaceError("the CPU launches nothing")

    def free_bytes(self) -> int | None:
        """Return None: device memory is host memory."""
        return None

    def mark_compute(self) -> Mark:
        """Return a mark that is reached."""
        return ReachedMark()

    def finish_compute(self) -> None:
        """Do nothing: all work is done when its call returns."""

    def synchronize(self) -> None:
        """Do nothing: all work is done when its call returns."""
