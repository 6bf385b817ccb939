"""Writing a session: pages as they come, and at the end the index that makes them one.

Pages have names that no other save has. The index is written beside the one that is there and
takes its name in one step. So a save that is cut off at any place leaves the session as it was.
"""

import concurrent.futures
import contextlib
import errno
import io
import os
import secrets
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from headinfer.errors import SessionFileError, SessionRoomError
from headinfer.folders import describe
from headinfer.saved.folder import (
    MESSAGES_NAME,
    check_room,
    check_saveable,
    holding,
    messages_path,
    read_index,
    remove_unlisted,
    session_name,
    synchronize_folder,
)
from headinfer.saved.index import INDEX_NAME, FileEntry, Index
from headinfer.saved.layout import Layout
from headinfer.units import format_bytes

_BUFFERS = 2
"""While one is written the other is filled."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_MOST_ON_THE_WAY = 4
"""Pages that the system has and the disk may not have yet."""


class SessionWriter:
    """A writer of one session; see `writing`.

    Args:
        folder: of the session; it is there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._generation = secrets.token_hex(4)
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(_BUFFERS)]
        self._written: list[concurrent.futures.Future[None] | None] = [None] * _BUFFERS
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "headinfer-session-writer")
        # In a thread of its own: the system takes the next page while the disk takes this one.
        self._disk = concurrent.futures.ThreadPoolExecutor(1, "headinfer-session-disk")
        self._on_disk: list[concurrent.futures.Future[None]] = []
        self._pages = 0
        self._shared: list[str] = []
        self._committed = False

    def begin(self, layout: Layout) -> dict[str, torch.Tensor]:
        """Return the tensors of the next file, to be filled before `end` is called.

        They lie in a buffer that is used again. Blocks until the file before last is written.

        Raises:
            OSError: a file could not be written.
        """
        self._wait(0)
        if self._buffers[0].numel() < layout.num_bytes:
            self._buffers[0] = torch.empty(layout.num_bytes, dtype=torch.uint8)
        return layout.begin(self._buffers[0])

    def end(self, layout: Layout, kind: str | None = None) -> FileEntry:
        """Have the file that was begun last be written, while the next one is filled.

        Args:
            layout: that it was begun with.
            kind: the end of its name; by default its number.
        """
        data = self._buffers[0][: layout.num_bytes].numpy().data
        entry = FileEntry(
            file=f"{self._generation}-{kind or format(self._pages, '06d')}.safetensors",
            num_bytes=layout.num_bytes,
            crc32=zlib.crc32(data),
        )
        self._pages += kind is None
        self._written[0] = self._pool.submit(self._write, self._folder / entry.file, data)
        self._buffers.append(self._buffers.pop(0))
        self._written.append(self._written.pop(0))
        return entry

    def share(self, folder: Path, entries: Sequence[FileEntry]) -> bool:
        """Have files of another session be files of this one, too; return whether they are.

        Args:
            folder: of that session, or this one's own.
            entries: of the files. Nobody changes one once it is written.
        """
        if folder == self._folder:
            return True
        try:
            for entry in entries:
                os.link(folder / entry.file, self._folder / entry.file)
                self._shared.append(entry.file)
        except OSError:
            self._drop_shared()
            return False
        return True

    def _drop_shared(self) -> None:
        while self._shared:
            with contextlib.suppress(OSError):
                (self._folder / self._shared.pop()).unlink()

    def commit(
        self, index: Index, written_by: dict[str, str], messages: bytes | None = None
    ) -> None:
        """Make what was written the session, in place of the one that was there.

        Args:
            index: of all files.
            written_by: versions, by program.
            messages: that go with it; None to leave those that are there.

        Raises:
            OSError: a file could not be written; the session is as it was.
            SessionFileError: the messages alone could not take their place; it has none now.
        """
        for number in range(_BUFFERS):
            self._wait(number)
        for on_disk in self._on_disk:
            on_disk.result()
        synchronize_folder(self._folder)
        new = self._folder / f"{INDEX_NAME}.new"
        _synchronize(_write_file(new, memoryview(index.to_json(written_by).encode())))
        if messages is not None:  # before: what fails here leaves both as they were
            _synchronize(_write_file(self._new_messages, memoryview(messages)))
        self._committed = True  # noted before: Ctrl-C behind the next line must remove nothing
        try:
            os.replace(new, self._folder / INDEX_NAME)
        except OSError:
            self._committed = False
            raise
        if messages is not None:
            self._place_messages()
        with contextlib.suppress(OSError):  # it is the session now, whatever comes
            synchronize_folder(self._folder)
            remove_unlisted(self._folder, {entry.file for entry in index.files})

    @property
    def _new_messages(self) -> Path:
        return self._folder / f"{MESSAGES_NAME}.new"

    def _place_messages(self) -> None:
        """Have the new messages take the place of the old ones, which are not this session's."""
        try:
            os.replace(self._new_messages, self._folder / MESSAGES_NAME)
        except OSError as error:
            for path in (self._new_messages, self._folder / MESSAGES_NAME):
                with contextlib.suppress(OSError):
                    path.unlink()
            raise SessionFileError(
                f"session {str(self._folder)!r} is saved without its messages: {describe(error)}"
            ) from error

    def close(self) -> None:
        """End the threads, once they wrote what they have."""
        for pool in (self._pool, self._disk):
            pool.shutdown(wait=True, cancel_futures=True)

    def abandon(self) -> None:
        """Remove what was written and not committed."""
        if self._committed:
            return
        self._drop_shared()
        for path in self._folder.glob(f"{self._generation}-*.safetensors"):
            with contextlib.suppress(OSError):
                path.unlink()
        for path in (self._folder / f"{INDEX_NAME}.new", self._new_messages):
            with contextlib.suppress(OSError):
                path.unlink()

    def _write(self, path: Path, data: memoryview) -> None:
        """Hand a page to the system, and have another thread wait for the disk."""
        while len(self._on_disk) >= _MOST_ON_THE_WAY:
            self._on_disk.pop(0).result()
        self._on_disk.append(self._disk.submit(_synchronize, _write_file(path, data)))

    def _wait(self, number: int) -> None:
        written, self._written[number] = self._written[number], None
        if written is not None:
            written.result()


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], num_bytes: int) -> Iterator[SessionWriter]:
    """Return a writer of a session; what it does not commit is removed at the end.

    Args:
        path: of the session, which may be there.
        num_bytes: that will be written, to be told early that there is no room.

    Raises:
        SessionFileError: it cannot be written there, for want of room (`SessionRoomError`) or
            otherwise. The session that was there is whole.
    """
    check_saveable(path)
    name = session_name(path)
    folder = Path(os.path.realpath(name))
    new = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        with holding(folder, alone=True):
            yield from _writing(folder, num_bytes)
    except OSError as error:
        kind = SessionRoomError if error.errno in _NO_ROOM else SessionFileError
        raise kind(
            f"the session cannot be saved as {name!r}: {describe(error)}; {format_bytes(num_bytes)}"
            f" are needed{'' if new else ', and the session that was there is as it was'}"
        ) from error
    finally:
        if new:
            with contextlib.suppress(OSError):  # it stays where something was committed
                folder.rmdir()


def _writing(folder: Path, num_bytes: int) -> Iterator[SessionWriter]:
    check_room(folder, num_bytes)
    _settle_messages(folder)
    writer = SessionWriter(folder)
    try:
        yield writer
    finally:
        writer.close()
        writer.abandon()


def _settle_messages(folder: Path) -> None:
    """Do what a save that was cut off left to do, as this one may leave the messages alone."""
    with contextlib.suppress(OSError, SessionFileError):  # there may be no session yet
        path = messages_path(folder, read_index(folder))
        if path.name != MESSAGES_NAME:
            os.replace(path, folder / MESSAGES_NAME)


def _write_file(path: Path, data: memoryview) -> io.FileIO:
    """Return a file that was written, still open."""
    file = io.FileIO(path, "wb")
    try:
        left = data
        while left:
            left = left[file.write(left) :]
    except BaseException:
        file.close()
        raise
    return file


def _synchronize(file: io.FileIO) -> None:
    """Have a file survive a loss of power, and close it."""
    with file:
        os.fsync(file.fileno())
