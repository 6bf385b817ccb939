"""A temporary file for tokens of running requests, read and written past the page cache."""

import collections
import contextlib
import errno
import os
import tempfile
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from headinfer.disk.folder import check_folder
from headinfer.disk.regions import Regions
from headinfer.disk.transfer import Transfer
from headinfer.errors import DiskError
from headinfer.folders import describe
from headinfer.units import format_bytes

DEPTH = 8
"""Reads and writes under way at once."""

PART_BYTES = 4 * 2**20
"""The most that one of them takes. Larger ones are cut, so that several are under way."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def aligned_empty(num_bytes: int) -> Tensor:
    """Return memory of the CPU that files can be read to and written from; bytes, one dimension."""
    alignment = SpillFile.ALIGNMENT
    whole = torch.empty(num_bytes + alignment, dtype=torch.uint8)
    start = -whole.data_ptr() % alignment
    return whole[start : start + num_bytes]


class SpillFile:
    """A file without a name: the system takes it back however the process ends.

    Several reads and writes are under way at once, in threads of its own. System calls release
    Python's lock, and each moves some MiB. io_uring has a package with wheels, but many containers
    forbid it. So threads would be needed anyway.

    One thread at a time may read, write and close. Any thread may free a region at any time. So may
    the garbage collector, while others are handed out: freeing never waits.

    Args:
        folder: where there is room for it.
        depth: reads and writes under way at once.
        part_bytes: the most that one of them takes; of whole alignments.

    Attributes:
        ALIGNMENT: bytes that offsets, sizes and addresses are multiples of.
        direct: whether the page cache is left out (`O_DIRECT`). Where the file system refuses that,
            its pages are given up behind each use (`posix_fadvise`). In memory (tmpfs) they
            stay, and no plan counts them.

    Raises:
        OptionError: the folder cannot be used.
        DiskError: no file can be made or written in it.
    """

    ALIGNMENT: ClassVar[int] = 4096

    def __init__(self, folder: str, *, depth: int = DEPTH, part_bytes: int = PART_BYTES) -> None:
        check_folder(folder)
        self._folder = folder
        self._part_bytes = part_bytes
        self._regions = Regions()
        self._handing_out = threading.Lock()
        self._freed: collections.deque[tuple[int, int]] = collections.deque()
        try:
            self._fd = _open_unnamed(folder)
            self._closing = weakref.finalize(self, os.close, self._fd)
            self.direct = _leave_out_page_cache(self._fd)
        except OSError as error:
            raise self._refusal("writing to", 0, error) from error
        self._threads = ThreadPoolExecutor(depth, thread_name_prefix="headinfer-disk")

    @property
    def size_bytes(self) -> int:
        """Bytes of the disk that regions take, those between them included."""
        return self._regions.end

    @property
    def free_bytes(self) -> int:
        """Bytes between regions, which are used again before the file grows."""
        with self._handing_out:
            self._take_back()
            return self._regions.free_bytes

    def allocate(self, num_bytes: int) -> int:
        """Return the offset of a region for so many bytes; freed regions are used again."""
        with self._handing_out:
            self._take_back()
            return self._regions.allocate(self._whole(num_bytes))

    def free(self, offset: int, num_bytes: int) -> None:
        """Give a region back, which nothing is under way with.

        Args:
            offset: as allocated.
            num_bytes: as allocated.
        """
        self._freed.append((offset, self._whole(num_bytes)))
        if self._handing_out.acquire(blocking=False):  # else whoever is at it, or comes next, does
            try:
                self._take_back()
            finally:
                self._handing_out.release()

    def _take_back(self) -> None:
        """Have freed regions handed out again, and what is behind all others given to the disk."""
        before = self._regions.end
        while self._freed:
            self._regions.free(*self._freed.popleft())
        if self._regions.end < before and self._closing.alive:  # else the number is another file's
            with contextlib.suppress(OSError):  # the space is then free later
                os.ftruncate(self._fd, self._regions.end)

    def write(self, offset: int, memory: Tensor) -> Transfer:
        """Begin to write.

        Args:
            offset: in the file, aligned.
            memory: bytes on the CPU, in one dimension, contiguous, of an aligned address and size;
                not to be changed until the transfer is done.
        """
        return self._begin("writing to", self._write_part, offset, memory)

    def read(self, offset: int, into: Tensor) -> Transfer:
        """Begin to read what was written.

        Args:
            offset: in the file, aligned.
            into: memory as that of `write`; not to be used until the transfer is done.
        """
        return self._begin("reading from", self._read_part, offset, into)

    def close(self) -> None:
        """End all transfers and give the file up; may be called again."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._closing()

    def _whole(self, num_bytes: int) -> int:
        return -(-num_bytes // self.ALIGNMENT) * self.ALIGNMENT

    def _begin(
        self, what: str, part: Callable[[int, memoryview], None], offset: int, memory: Tensor
    ) -> Transfer:
        assert memory.dtype is torch.uint8, f"bytes are moved, not {memory.dtype}"
        assert memory.dim() == 1, f"{memory.dim()} dimensions"
        assert memory.is_contiguous(), "there are gaps in the memory"
        for number in (offset, memory.nbytes, memory.data_ptr()):
            assert number % self.ALIGNMENT == 0, f"{number} is not aligned"
        refusal = partial(self._refusal, what, memory.nbytes)
        view = memory.numpy().data  # which keeps the memory
        try:
            parts = [
                self._threads.submit(part, offset + start, view[start : start + self._part_bytes])
                for start in range(0, memory.nbytes, self._part_bytes)
            ]
        except RuntimeError as error:  # it was closed
            raise refusal(error) from None
        return Transfer(parts, refusal)

    def _write_part(self, offset: int, view: memoryview) -> None:
        def write(at: int) -> int:
            return os.pwritev(self._fd, [view[at:]], offset + at)

        self._move_all(len(view), write, OSError(errno.EIO, "nothing was written"))
        if not self.direct:
            os.fdatasync(self._fd)  # pages that are not on the disk yet cannot be given up
        self._forget(offset, len(view))

    def _read_part(self, offset: int, view: memoryview) -> None:
        def read(at: int) -> int:
            return os.preadv(self._fd, [view[at:]], offset + at)

        self._move_all(len(view), read, EOFError())
        self._forget(offset, len(view))

    def _move_all(self, num_bytes: int, move: Callable[[int], int], nothing: Exception) -> None:
        """Move bytes until all have moved; what ended early goes on at the last alignment.

        Python itself repeats calls that were interrupted.

        Args:
            num_bytes: to move.
            move: asks the system to move all bytes from one on, and returns how many it did.
            nothing: raised where a call got no further.
        """
        done = 0
        while done < num_bytes:
            moved = done + move(done)
            if moved < num_bytes:
                moved -= moved % self.ALIGNMENT
            if moved <= done:
                raise nothing
            done = moved

    def _forget(self, offset: int, num_bytes: int) -> None:
        if not self.direct:
            os.posix_fadvise(self._fd, offset, num_bytes, os.POSIX_FADV_DONTNEED)

    def _refusal(self, what: str, num_bytes: int, error: BaseException) -> DiskError:
        named = f"disk_cache {self._folder!r}"
        if isinstance(error, CancelledError | RuntimeError):
            return DiskError(f"{what} {named} ended early: the file was closed")
        if isinstance(error, EOFError):
            return DiskError(
                f"{named} gave fewer bytes than were written: its file was cut short; run again, "
                "and check the disk if it comes back"
            )
        assert isinstance(error, OSError)
        if error.errno in _NO_ROOM:
            return DiskError(
                f"{named} has no room for {format_bytes(num_bytes)} more beside the "
                f"{format_bytes(self.size_bytes)} taken ({describe(error)}); free space, name "
                "another folder, shorten the context or give more host_memory"
            )
        return DiskError(
            f"{what} {named} failed: {describe(error)}; check the disk, or name another folder"
        )


def _open_unnamed(folder: str) -> int:
    """Open a file that has no name, or has lost it."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(folder, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise
    fd, name = tempfile.mkstemp(dir=folder)
    os.unlink(name)
    return fd


def _leave_out_page_cache(fd: int) -> bool:
    """Open a file for direct transfers, and return whether they work.

    Some file systems take the flag, and refuse the transfers.
    """
    import fcntl

    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    block = aligned_empty(SpillFile.ALIGNMENT).numpy().data
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.pwritev(fd, [block], 0)
        works = os.preadv(fd, [block], 0) == len(block)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        works = False
    if not works:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    os.ftruncate(fd, 0)
    return works
