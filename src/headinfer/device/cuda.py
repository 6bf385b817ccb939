"""CUDA: pinned host memory, three streams beside the model's own, and captures."""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from headinfer.device import cuda_driver
from headinfer.device.base import Capture, Device, Mark, Server, Stream
from headinfer.device.cuda_graph import CudaCapture
from headinfer.device.cuda_stream import CudaEvent, CudaStream
from headinfer.device.host_ahead import HostMemory, ReadyMemory
from headinfer.device.host_memory import available_host_bytes
from headinfer.device.host_pages import Pieces, commit, map_pages
from headinfer.device.launches import launches
from headinfer.device.regions import Region, SpareRegions
from headinfer.device.together import Together
from headinfer.errors import MemoryPlanError, OptionError
from headinfer.units import format_bytes

_CUDA_SUCCESS = 0

_HOST_PIECE_BYTES = 256 * 2**20
"""Locked by one call of the driver, which may let nothing be launched meanwhile.

Locking took 40 ms for 1 GiB beside an H100, and so takes 10 for this."""

_capture_or_synchronize = threading.RLock()
"""A device that is waited for during a capture of another thread's spoils it, and fails itself."""

_Result = TypeVar("_Result")


class _Mapped:
    """A piece of host memory as uint8 on the device, for torch to view; torch keeps this object."""

    def __init__(self, memory: torch.Tensor, address: int) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.numel(),),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


@contextlib.contextmanager
def _workspaces_of_its_own() -> Iterator[None]:
    """Have cuBLAS take workspaces for a capture within it, and not those of work before.

    Torch keeps one for each stream until somebody has it forget all of them, as its compiler does
    around captures of its own. What is taken within a capture stays in the memory of its graphs.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _locked(torch_device: torch.device, num_bytes: int) -> Region:
    """Map and lock memory, rounded up to whole pages.

    The memory is mapped and registered by hand because torch's pinned allocator rounds up to a
    power of two. For a KV cache that can double the host memory used.
    """
    # Committed before, because locking commits pages one by one, in the driver: beside an H100
    # 1 GiB took 203 ms so, and 59 ms where all threads had written it.
    pages = map_pages(num_bytes, at_once=True)
    tensor = Region(pages).tensor(num_bytes)
    commit(tensor)
    storage = tensor.untyped_storage()
    address = storage.data_ptr()
    cudart: Any = torch.cuda.cudart()
    launches.wait()  # nothing can be launched while the driver locks memory
    with torch.cuda.device(torch_device):
        status = int(cudart.cudaHostRegister(address, storage.nbytes(), 0))
    if status != _CUDA_SUCCESS:
        with contextlib.suppress(RuntimeError):  # the next operation would report it again
            torch.zeros(1, device=torch_device)
        raise MemoryPlanError(
            f"cannot lock {format_bytes(num_bytes)} of CPU memory for the KV cache (CUDA "
            f"error {status}); free memory or raise the limit shown by `ulimit -l`"
        )
    return Region(pages, functools.partial(cudart.cudaHostUnregister, address))


class CudaDevice:
    """A CUDA GPU.

    `compute` is the stream that is current when the model runs, so the engine joins whatever
    stream the caller chose. The other streams are the engine's own.

    Raises:
        OptionError: CUDA is not available.
    """

    name = "cuda"
    tiles_are_views = False
    packs_fast = torch.version.hip is None  # it was measured on no other
    checks_accesses = False
    captures = True
    host_piece_bytes = _HOST_PIECE_BYTES

    def __init__(self, torch_device: torch.device) -> None:
        if not torch.cuda.is_available():
            raise OptionError("device 'cuda' was asked for, but CUDA is not available; use 'cpu'")
        torch_device = torch.empty(0, device=torch_device).device  # which also knows its index
        self.torch_device = torch_device
        self.compute: Stream = CudaStream(torch_device, None)
        self.copy_in: Stream = CudaStream(torch_device, torch.cuda.Stream(torch_device))
        self.copy_out: Stream = CudaStream(torch_device, torch.cuda.Stream(torch_device))
        self.host_work: Stream = CudaStream(torch_device, torch.cuda.Stream(torch_device))
        self._regions = SpareRegions(functools.partial(_locked, torch_device), available_host_bytes)
        self._pieces = Pieces(self._regions.take, self._regions.take_spare)
        # One thread: the driver locks one region at a time. It ends with the device.
        self._getting = ThreadPoolExecutor(1, "headinfer-host-memory")
        self._apart = torch.cuda.Stream(torch_device)
        self._graph_pool: Any = None  # which all graphs share, since they never run at once
        self._graphs: weakref.WeakSet[CudaCapture[Any]] = weakref.WeakSet()
        self._capturing: CudaCapture[Any] | None = None
        self._pool_beside: weakref.ref[torch.cuda.MemPool] | None = None

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """Return torch's own guard."""
        return torch.cuda.device(self.torch_device)

    def host_empty(self, num_bytes: int) -> torch.Tensor:
        """Return page-locked memory of exactly `num_bytes`.

        Raises:
            MemoryPlanError: the system refuses to map or to lock that much.
        """
        # A pause, or whoever locks memory would wait for this thread, and it for them.
        with launches.paused():
            return self._pieces.take(num_bytes)

    def host_ahead(self, num_bytes: int) -> HostMemory:
        """Have host memory committed and locked by a thread of its own; see `host_empty`."""
        ready = self._pieces.take_ready(num_bytes)
        if ready is None:
            return self._getting.submit(self.host_empty, num_bytes)
        return ReadyMemory(ready)

    @property
    def spare_host_bytes(self) -> int:
        """Host memory that is kept for the next caches."""
        return self._regions.spare_bytes

    def keep_host_memory(self, spare_bytes: int, most_bytes: int | None) -> None:
        """Keep locked memory of caches that are gone; see `Device.keep_host_memory`."""
        self._regions.keep(spare_bytes, most_bytes)

    def device_empty(self, num_bytes: int) -> torch.Tensor:
        """Return memory from torch's caching allocator on this device."""
        try:
            with torch.inference_mode(False):
                return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            raise MemoryPlanError(
                f"the device has no {format_bytes(num_bytes)} left for the KV arena; give a "
                "smaller device_memory or smaller tiles and chunks"
            ) from error

    def give_back_unused(self) -> None:
        """Have torch's allocator keep nothing; waits for the device where there is anything."""
        with _capture_or_synchronize, torch.cuda.device(self.torch_device):
            torch.cuda.empty_cache()

    def mapped(self, memory: torch.Tensor) -> torch.Tensor:
        """Return a view of page-locked memory as the device addresses it."""
        address = memory.data_ptr()
        if torch.version.hip is None:
            address = cuda_driver.mapped_address(self.torch_device, address)
        with torch.inference_mode(False), torch.cuda.device(self.torch_device):
            return torch.as_tensor(_Mapped(memory, address), device=self.torch_device)

    def host_access(self, tensor: torch.Tensor, *, write: bool, purpose: str) -> None:
        """Do nothing: CUDA does not check."""

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Have the current stream be one of ours; see `Device.apart`."""
        outside = torch.cuda.current_stream(self.torch_device)
        self._apart.wait_stream(outside)
        try:
            with torch.cuda.stream(self._apart):
                yield
        finally:
            outside.wait_stream(self._apart)

    def capture(self, work: Callable[[], _Result], *beside: Device) -> Capture[_Result]:
        """Capture a CUDA graph; see `Device.capture`."""
        if not self._graphs:  # torch takes none into a pool whose last graph is gone
            self._graph_pool = torch.cuda.graph_pool_handle()
        others = [device for device in beside if isinstance(device, CudaDevice)]
        assert len(others) == len(beside), "one kind of device captures"
        pools = [device.pool_beside() for device in others]
        capture: CudaCapture[_Result] = CudaCapture(self._graph_pool, Together(self, others), pools)
        with _capture_or_synchronize, contextlib.ExitStack() as taking_part:
            for device, pool in zip(others, pools, strict=True):
                taking_part.enter_context(device.taking_part(capture))
                taking_part.enter_context(torch.cuda.use_mem_pool(pool, device.torch_device))
            taking_part.enter_context(self.taking_part(capture))
            taking_part.enter_context(_workspaces_of_its_own())
            capture.record(work)
        self._graphs.add(capture)
        return capture

    @contextlib.contextmanager
    def taking_part(self, capture: CudaCapture[Any]) -> Iterator[None]:
        """Have compute take part in a capture, on a stream of ours."""
        with self.apart():
            self._capturing = capture
            try:
                yield
            finally:
                self._capturing = None

    def pool_beside(self) -> torch.cuda.MemPool:
        """Return memory of this device's for graphs that others launch; they keep and share it.

        A graph's own pool is of the device that launches it.
        """
        pool = None if self._pool_beside is None else self._pool_beside()
        if pool is None:
            with self.in_use():
                pool = torch.cuda.MemPool()
            self._pool_beside = weakref.ref(pool)
        return pool

    def launch(self, work: Callable[[], None]) -> None:
        """Run it: a captured kernel reads memory by itself."""
        work()

    def aside(self, work: Callable[[], None]) -> None:
        """Call a function now, or between two graphs of what is being captured."""
        if self._capturing is None:
            work()
        else:
            self._capturing.aside(work)

    def serve(self, server: Server) -> None:
        """Begin its thread."""
        server.begin()

    def free_bytes(self) -> int | None:
        """Return what the driver has free and what torch's allocator holds unused."""
        free, _total = torch.cuda.mem_get_info(self.torch_device)
        # Once: each of torch's functions for a single number gets all of them, and sorts them.
        stats = torch.cuda.memory_stats_as_nested_dict(self.torch_device)
        held, used = (
            stats[name]["all"]["current"] for name in ("reserved_bytes", "allocated_bytes")
        )
        return int(free + held - used)

    def mark_compute(self) -> Mark:
        """Return a mark in the stream the model runs on."""
        return CudaEvent(torch.cuda.current_stream(self.torch_device), timed=False)

    def finish_compute(self) -> None:
        """Wait for the stream the model runs on."""
        torch.cuda.current_stream(self.torch_device).synchronize()

    def synchronize(self) -> None:
        """Wait for all streams of this device."""
        with _capture_or_synchronize:
            torch.cuda.synchronize(self.torch_device)
