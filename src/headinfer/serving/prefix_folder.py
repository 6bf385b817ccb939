"""Prefixes on the disk: sessions in one folder, found by their token ids also after a restart."""

import contextlib
import logging
import os
import re
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from headinfer.errors import HeadInferError, OptionError, SessionFileError
from headinfer.folders import describe
from headinfer.integration.cache import OffloadedCache
from headinfer.plan.memory import SPARE_TOKENS
from headinfer.saved.fingerprint import Fingerprint
from headinfer.saved.folder import read_index
from headinfer.saved.index import Index
from headinfer.saved.tokens import read_token_ids
from headinfer.session import Session

_logger = logging.getLogger(__name__)

_ENDING = ".hsession"

_OWN_NAME = re.compile(rf"[0-9a-f]{{16}}{re.escape(_ENDING)}")
"""Names of prefixes; all other sessions have their names from users, and are theirs."""


def is_own_name(name: str) -> bool:
    """Whether a folder of this name is a prefix that may be replaced and removed."""
    return _OWN_NAME.fullmatch(name) is not None


def is_prefix_name(name: str) -> bool:
    """Whether prompts go on from a session of this name, without its being restored."""
    return name.endswith(_ENDING)


@dataclass(slots=True, kw_only=True, eq=False)
class SavedPrefix:
    """A prefix on the disk.

    Attributes:
        path: of its session.
        ids: its tokens, `[tokens]` of int64.
        num_bytes: of its files.
        earliest_crop: the fewest tokens that it may go back to.
        named: whether a user gave it its name: then it stays as it is.
        id: of the slot that it is, or was.
        owned: whether a cache goes on from it, and saves to it.
        used: grows with each use.
    """

    path: Path
    ids: torch.Tensor
    num_bytes: int
    earliest_crop: int
    named: bool = False
    id: str = ""
    owned: bool = False
    used: int = 0

    def __post_init__(self) -> None:
        # A user may have `book` beside `book.hsession`.
        self.id = self.id or (self.path.name if self.named else self.path.stem)


def make_session_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder of prefixes, where there is none.

    Args:
        path: of the folder.

    Raises:
        OptionError: it cannot be made or written.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):  # what may be written only trying tells
            pass
    except OSError as error:
        reason = error.strerror or describe(error)
        raise OptionError(
            f"session_folder {os.fspath(path)!r} cannot be used: {reason}; give a folder that you "
            "can write to"
        ) from error


def lacking_bytes(path: str | os.PathLike[str], most_bytes: int) -> int:
    """Return what the disk lacks now for a folder of prefixes to be as large as it may.

    Args:
        path: of the folder, whose prefixes count as room: they are replaced.
        most_bytes: that they may take.
    """
    free_bytes = shutil.disk_usage(path).free
    return max(most_bytes - free_bytes - _sessions_bytes(Path(path)), 0)


def _sessions_bytes(folder: Path) -> int:
    """Return the bytes of all sessions in a folder; files that several share count once."""
    files = {}
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):  # another save may just replace it
            status = path.stat()
            files[status.st_dev, status.st_ino] = status.st_size
    return sum(files.values())


class PrefixFolder:
    """A folder of prefixes, each a session as `OffloadedCache.save` writes it.

    Args:
        path: of the folder, which is made.
        session: makes caches of what is loaded.

    Raises:
        OptionError: it cannot be made or written.
    """

    def __init__(self, path: str | os.PathLike[str], session: Session) -> None:
        self.path = Path(path)
        self._session = session
        self._model: Fingerprint | None = None
        make_session_folder(path)

    def has(self, path: Path) -> bool:
        """Whether a session lies in the folder itself, and no link leads out of it."""
        return Path(os.path.realpath(path)).parent == Path(os.path.realpath(self.path))

    def found(self) -> list[SavedPrefix]:
        """Return each session of this model that is there, oldest first.

        What is damaged is left out, with a warning; what is of another model, without one.
        """
        found = []
        for path in sorted(self.path.glob(f"*{_ENDING}"), key=changed_s):
            if not self.has(path):
                continue
            try:
                saved = self.described(path, named=not is_own_name(path.name))
            except SessionFileError as error:
                _logger.warning("a kept prefix is left out: %s", error)
                continue
            if saved is not None:
                found.append(saved)
        return found

    def described(self, path: Path, *, named: bool) -> SavedPrefix | None:
        """Return what a session has; None where it is of another model.

        Args:
            path: of the session.
            named: whether its name is a user's.

        Raises:
            SessionFileError: it cannot be read.
        """
        index = read_index(path)
        if not self.is_ours(index):
            return None
        return SavedPrefix(
            path=path,
            ids=read_token_ids(path, index)[0],
            num_bytes=index.num_bytes,
            earliest_crop=self._earliest_crop(index),
            named=named,
        )

    def is_ours(self, index: Index) -> bool:
        """Whether a session is of this model, of one row with token ids, and was never rounded."""
        if self._model is None:
            self._model = self._session.fingerprint()
        ours = index.rows == 1 and index.with_ids and index.rounded is None
        return ours and self._model.difference(index.model) is None

    def save(
        self, cache: OffloadedCache, home: SavedPrefix | None, slot_id: str
    ) -> SavedPrefix | None:
        """Write a parked cache; None where it cannot be written, which is logged.

        Args:
            cache: with the tokens.
            home: has the first of them, and is replaced; None for a session of its own.
            slot_id: of what is saved.
        """
        name = f"{secrets.token_hex(8)}{_ENDING}"
        path = self.path / name if home is None else home.path
        try:
            cache.save(path)
            index = read_index(path)
        except HeadInferError as error:
            _logger.warning("a prefix could not be saved: %s", error)
            return None
        known = cache.token_ids
        assert known is not None
        saved = home or SavedPrefix(
            path=path, ids=known[0], num_bytes=0, earliest_crop=0, owned=True
        )
        saved.ids, saved.num_bytes, saved.id = known[0], index.num_bytes, slot_id
        saved.earliest_crop = self._earliest_crop(index)
        return saved

    def _earliest_crop(self, index: Index) -> int:
        """Return the fewest tokens that a session may go back to; whoever loads it finds out."""
        if self._session.goes_back:
            return 0
        if index.state_values:
            return index.tokens
        return max(index.tokens - SPARE_TOKENS, 0)

    def load(self, saved: SavedPrefix) -> OffloadedCache | None:
        """Return a cache with a session's tokens, or those before a damaged place.

        None where none can be used; the log says why.
        """
        with contextlib.suppress(OSError):
            os.utime(saved.path)  # so that a restart knows which was used last
        try:
            cache = self._session.load_cache(saved.path, None, partial=True)
        except SessionFileError as error:
            _logger.warning("a kept prefix is left out: %s", error)
            return None
        if not cache.get_seq_length():
            cache.close()
            return None
        return cache

    @property
    def num_bytes(self) -> int:
        """Disk space of all sessions in the folder; files that several share count once."""
        return _sessions_bytes(self.path)

    def remove(self, saved: SavedPrefix) -> None:
        """Remove a session; what cannot be removed stays."""
        with contextlib.suppress(OSError):
            shutil.rmtree(saved.path)


def changed_s(path: Path) -> float:
    """Return when a folder was changed, in seconds; 0 where it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
