"""Regions of the file below host memory that hold tokens, or will once they are written."""

from collections.abc import Iterator

import torch

from headinfer.disk.file import SpillFile
from headinfer.disk.transfer import Transfer


class Region:
    """A region of the file, written once, and never changed.

    What is to be written is kept, as it is, until it has landed. Until then reads are copies of
    that. A write that failed can be begun anew.

    One thread at a time may use it, and any may free it.

    Args:
        file: the file.
        memory: bytes to be written there, as `SpillFile.write` takes them; not to be changed until
            they have landed.

    Attributes:
        num_bytes: how many there are.
        lost: whether Ctrl-C came as a write began. Parts that nobody can wait for may be under way.
            So its bytes of the file are never handed out again, and what was to be written stays in
            memory.
    """

    __slots__ = ("_file", "_freed", "_memory", "_offset", "_write", "lost", "num_bytes")

    def __init__(self, file: SpillFile, memory: torch.Tensor) -> None:
        self.num_bytes = memory.numel()
        self._file = file
        self._memory: torch.Tensor | None = memory
        self._write: Transfer | None = None
        self._freed = False
        self.lost = False
        self._offset = file.allocate(self.num_bytes)

    def begin(self) -> None:
        """Begin to write, or begin anew; nothing where it was given back meanwhile.

        Raises:
            DiskError: the file was closed.
        """
        assert self._memory is not None
        if self._freed or self.lost:
            return
        self.lost = True
        self._write = self._file.write(self._offset, self._memory)
        self.lost = False

    @property
    def landed(self) -> bool:
        """Whether all is on the disk, or will never be read; its memory is then not needed here."""
        write, lost = self._write, self.lost  # once: another thread may begin it anew
        if self._memory is None:
            return True
        if lost:
            return False
        if write is None:
            return self._freed
        if not write.done() or (write.failed and not self._freed):
            return False
        self._memory = None
        return True

    @property
    def failed(self) -> bool:
        """Whether its write failed, or was never begun, and it is still wanted."""
        write = self._write
        if self._freed or self.lost or self._memory is None:
            return False
        return write is None or write.failed

    @property
    def untold(self) -> bool:
        """Whether its write failed, and nobody was told."""
        return self.failed and self._write is not None and not self._write.told

    def settle(self) -> None:
        """Block until its write has ended, well or not."""
        if self._write is not None:
            self._write.settle()

    def wait(self) -> None:
        """Block until its write has ended. Whoever hears of a failure has been told.

        Raises:
            DiskError: the disk has no room for it, or failed.
        """
        if self._write is not None:
            self._write.wait()

    def read(self, offset: int, into: torch.Tensor) -> Iterator[Transfer]:
        """Begin to read what was written; copy at once what has not landed.

        Args:
            offset: in the region, aligned.
            into: memory as `SpillFile.read` takes it.

        Yields:
            The transfer, where there is one.
        """
        memory = None if self.landed else self._memory
        if memory is None:
            yield self._file.read(self._offset + offset, into)
        else:
            into.copy_(memory[offset : offset + into.numel()])

    def free(self) -> None:
        """Give it back, with no read under way in it, and discard a write that is.

        This never waits. The bytes of the file are handed out again once the write has ended.
        """
        self._freed = True
        if self.lost:
            return
        file, offset, num_bytes, write = self._file, self._offset, self.num_bytes, self._write
        if write is None:
            file.free(offset, num_bytes)
            return
        write.cancel()
        write.then(lambda: file.free(offset, num_bytes))
