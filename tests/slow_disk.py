"""A disk whose writes end when a test says so, below the memory of a small model's cache."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from above_disk import attached
from headinfer.disk.file import SpillFile
from headinfer.disk.transfer import Transfer

LEFT = 450
"""Tokens of which one block of each layer goes to the disk, in the last chunk."""

_PATIENCE_S = 30.0


class SlowDisk:
    """A disk whose writes end once they are released.

    Attributes:
        writes: begun so far, each with its bytes.
        log: of what has ended: "write", "failure" or "read", the first byte, and one past the last.
        error: that writes fail with; None where they go well.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._released = threading.Event()
        self.writes: list[tuple[Transfer, int]] = []
        self.log: list[tuple[str, int, int]] = []
        self.error: OSError | None = None
        write, begin, read = os.pwritev, SpillFile.write, os.preadv

        def slowly(fd: int, views: list[memoryview], at: int) -> int:
            if not self._released.wait(_PATIENCE_S):
                raise OSError(errno.ETIMEDOUT, "nobody released the write")
            if self.error is not None:
                self.log.append(("failure", at, at + len(views[0])))
                raise self.error
            written = write(fd, views, at)
            self.log.append(("write", at, at + written))
            return written

        def noted(file: SpillFile, offset: int, memory: torch.Tensor) -> Transfer:
            transfer = begin(file, offset, memory)
            self.writes.append((transfer, memory.nbytes))
            return transfer

        def read_noted(fd: int, views: list[memoryview], at: int) -> int:
            self.log.append(("read", at, at + len(views[0])))
            return read(fd, views, at)

        monkeypatch.setattr(SpillFile, "write", noted)
        monkeypatch.setattr(os, "pwritev", slowly)
        monkeypatch.setattr(os, "preadv", read_noted)

    @property
    def under_way(self) -> int:
        """Bytes that are being written."""
        return sum(num_bytes for transfer, num_bytes in self.writes if not transfer.done())

    def release(self) -> None:
        self._released.set()

    def hold(self) -> None:
        self._released.clear()

    def fail_all(self, error: OSError) -> None:
        """Have all writes that were begun fail, and those to come until `error` is None."""
        self.error = error
        self.release()
        for transfer, _ in self.writes:
            transfer.settle()

    def release_when(self, owner: type, name: str) -> None:
        """Release all writes as a method is called."""
        real = getattr(owner, name)

        def released(*args: Any, **kwargs: Any) -> Any:
            self.release()
            return real(*args, **kwargs)

        self._patch.setattr(owner, name, released)


def opened(model: PreTrainedModel, folder: Path, slow: SlowDisk, **options: Any) -> Any:
    """Attach above a disk that is slow from here on: making its file takes a write, too."""
    slow.release()
    offload = attached(model, folder, **options)
    slow.hold()
    slow.log.clear()
    return offload


def in_memory(model: PreTrainedModel, *calls: torch.Tensor) -> torch.Tensor:
    """Return the last logits of some calls of stock transformers."""
    cache = None
    for tokens in calls:
        output = model(tokens, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    return output.logits[:, -1]
