"""The CPU as device: host memory is device memory, so no copy and no stream exists."""

import contextlib
from collections.abc import Callable
from typing import NoReturn, TypeVar

import torch

from headinfer.device.base import Capture, Device, Mark, PlaceError, Server
from headinfer.device.cpu_capture import CpuCapture, CpuRecording
from headinfer.device.host_pages import map_host_memory
from headinfer.device.marks import ReachedMark

_Result = TypeVar("_Result")


class CpuDevice:
    """A device whose tiles are views of the host store; its streams must never be asked for."""

    name = "cpu"
    tiles_are_views = True
    packs_fast = False
    checks_accesses = False
    captures = True
    torch_device = torch.device("cpu")
    host_piece_bytes = None
    spare_host_bytes = 0

    def __init__(self) -> None:
        self._recording: CpuRecording | None = None

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

    def keep_host_memory(self, spare_bytes: int, most_bytes: int | None) -> None:
        """Do nothing: getting memory takes no time."""

    device_empty = host_empty

    def give_back_unused(self) -> None:
        """Do nothing: none is kept."""

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

    def capture(self, work: Callable[[], _Result], *beside: Device) -> Capture[_Result]:
        """Record a function's operations, while they run; see `CpuCapture`."""
        recording = self._recording = CpuRecording()
        try:
            return CpuCapture(work, recording)
        finally:
            self._recording = None

    def launch(self, work: Callable[[], None]) -> None:
        """Call a function now, and at each replay of what is being captured."""
        if self._recording is None:
            work()
        else:
            self._recording.launch(work)

    def aside(self, work: Callable[[], None]) -> None:
        """Call a function now, or at each replay of what is being captured."""
        if self._recording is None:
            work()
        else:
            self._recording.aside(work)

    def serve(self, server: Server) -> NoReturn:
        """Raise: nothing is asked by flags."""
        raise PlaceError("the CPU has no streams")

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
