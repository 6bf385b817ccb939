"""Host memory for the KV cache, mapped by hand: of the size asked for, and of large pages."""

import contextlib
import ctypes
import errno
import functools
import mmap
import sys
import threading
from collections.abc import Callable

import torch

from headinfer.device.regions import Region
from headinfer.errors import MemoryPlanError
from headinfer.units import format_bytes

# A shared mapping would count against a container's shared-memory limit. Windows has neither flag.
_PRIVATE: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)

_LEAST_LARGE_BYTES = 32 * 2**20
"""Smaller regions have small pages. A large page is committed whole by its first byte, and what a
cache grows by is written little by little."""

_LEAST_LARGE_COMMITTED_BYTES = 4 * 2**20
"""The same for regions that are committed at once: one large page at least, wherever they begin."""

_PIECES = 8
_LARGEST_PIECE_BYTES = 8 * 2**20
_PIECE_MULTIPLE = 4096
"""Regions of pieces have a power of two of these, so that those of one prompt serve the next."""


class Pieces:
    """A source of small pieces, cut from regions that are got at once.

    The layers of a short prompt need many small pieces, and so do layers that grow by a few tokens.
    A region is freed with the last tensor on it. What is left of the newest is kept for what comes
    next, 60 MiB at most.

    Measured beside an H100: to lock 4 MiB of host memory took 0.9 ms, of which 0.2 are for its
    size.

    Args:
        allocate: returns a region `[num_bytes]` of uint8, or raises `MemoryPlanError`.
        allocate_ready: returns one that takes no time; None where there is none.
    """

    def __init__(
        self,
        allocate: Callable[[int], torch.Tensor],
        allocate_ready: Callable[[int], torch.Tensor | None] = lambda _num_bytes: None,
    ) -> None:
        self._allocate, self._allocate_ready = allocate, allocate_ready
        self._turn = threading.Lock()  # memory is also got in the background
        self._region = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used_bytes = 0  # of the region

    def take(self, num_bytes: int) -> torch.Tensor:
        """Return memory `[num_bytes]` of uint8 that nobody else has.

        Raises:
            MemoryPlanError: it cannot be had, not even without the rest of a region.
        """
        whole = _whole(num_bytes)
        if not 0 < whole <= _LARGEST_PIECE_BYTES:
            return self._allocate(num_bytes)
        with self._turn:
            if self._used_bytes + whole > self._region.numel():
                try:
                    self._begin(self._allocate(_region_bytes(whole)))
                except MemoryPlanError:
                    return self._allocate(num_bytes)
            return self._cut(num_bytes, whole)

    def take_ready(self, num_bytes: int) -> torch.Tensor | None:
        """Return memory that takes no time; None where there is none. See `take`."""
        whole = _whole(num_bytes)
        if not 0 < whole <= _LARGEST_PIECE_BYTES:
            return self._allocate_ready(num_bytes)
        if not self._turn.acquire(blocking=False):
            return None
        try:
            if self._used_bytes + whole > self._region.numel():
                region = self._allocate_ready(_region_bytes(whole))
                if region is None:
                    return None
                self._begin(region)
            return self._cut(num_bytes, whole)
        finally:
            self._turn.release()

    def _begin(self, region: torch.Tensor) -> None:
        self._region, self._used_bytes = region, 0

    def _cut(self, num_bytes: int, whole: int) -> torch.Tensor:
        first, self._used_bytes = self._used_bytes, self._used_bytes + whole
        piece = self._region[first : first + num_bytes]
        if self._used_bytes == self._region.numel():  # or it would outlive its pieces
            self._begin(torch.empty(0, dtype=torch.uint8, device="cpu"))
        return piece


def _whole(num_bytes: int) -> int:
    return -(-num_bytes // _PIECE_MULTIPLE) * _PIECE_MULTIPLE


def _region_bytes(piece_bytes: int) -> int:
    return 1 << (_PIECES * piece_bytes - 1).bit_length()


def map_host_memory(num_bytes: int) -> torch.Tensor:
    """Return pageable memory `[num_bytes]` of uint8; the system commits pages as they are written.

    The memory is unmapped when the last tensor on it is gone.

    Raises:
        MemoryPlanError: the system refuses to map that much.
    """
    return Region(map_pages(num_bytes)).tensor(num_bytes)


def map_pages(num_bytes: int, *, at_once: bool = False) -> mmap.mmap:
    """Return a mapping of pages that the system commits as they are written.

    The pages are large where the system grants them.

    Measured on a virtual machine, where each miss of the page table costs twice: large pages made
    attention in a decode step 11% faster.

    Args:
        num_bytes: of it.
        at_once: whether all of it will be committed before it is used; see `commit`.

    Raises:
        MemoryPlanError: the system refuses to map that much.
    """
    try:
        region = mmap.mmap(-1, max(num_bytes, 1), **_PRIVATE)
    except OSError as error:
        raise MemoryPlanError(
            f"cannot map {format_bytes(num_bytes)} of CPU memory: {error}"
        ) from error
    least = _LEAST_LARGE_COMMITTED_BYTES if at_once else _LEAST_LARGE_BYTES
    if num_bytes >= least and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # not every kernel has them
            region.madvise(mmap.MADV_HUGEPAGE)
    return region


_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, of Linux 5.14 and later; `mmap` has no name for it


def commit(memory: torch.Tensor) -> None:
    """Have the system commit all pages of mapped memory, which is taken to be 0 then.

    Python's lock is free meanwhile. Only this thread works: several are no faster, as they wait for
    each other in the system, and so does whoever maps memory meanwhile.

    Measured on a virtual machine, for 1 GiB: large pages took 0.14 s, or 0.19 s where they were
    written. Small pages took 0.61 s, or 0.87 s. Beside an H100, 3 GiB of large pages took one
    thread 0.54 s, and launches took their usual time. Four threads took 0.43 and 0.66 s, and
    launches three times as long.

    Args:
        memory: of `map_host_memory`, not written yet.

    Raises:
        MemoryPlanError: the system has no such memory.
    """
    address, num_bytes = memory.data_ptr(), memory.numel()
    if not num_bytes:
        return
    madvise = getattr(_libc(), "madvise", None)
    if madvise is not None:
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        if not madvise(address, num_bytes, _POPULATE_WRITE):
            return
        if ctypes.get_errno() in (errno.ENOMEM, errno.EFAULT):
            raise MemoryPlanError(f"the system has no {format_bytes(num_bytes)} of CPU memory left")
    ctypes.memset(address, 0, num_bytes)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    return None if sys.platform == "win32" else ctypes.CDLL(None, use_errno=True)
