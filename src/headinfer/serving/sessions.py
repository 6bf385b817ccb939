"""Sessions with names of users, in the folder of the prefixes: saved from slots, and restored."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headinfer.errors import OptionError, SessionFileError
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.saving import SavedSession
from headinfer.saved.folder import MESSAGES_NAME, read_index
from headinfer.saved.messages import Messages
from headinfer.serving.kept import Kept
from headinfer.serving.prefix_folder import PrefixFolder, changed_s, is_own_name, is_prefix_name
from headinfer.serving.shelf import Shelf
from headinfer.session import Session
from headinfer.units import counted

_MOST_CHARS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedSession:
    """A session that a user gave a name.

    Attributes:
        name: of its folder.
        tokens: that it holds.
        num_bytes: of its files; what it shares with other sessions counts, too.
        changed_s: when it was saved, in seconds since 1970.
        conversation: whether it has messages.
    """

    name: str
    tokens: int
    num_bytes: int
    changed_s: float
    conversation: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredSession:
    """A session that is a slot again.

    Attributes:
        slot_id: of the slot; of one that was kept before, where that has all of the tokens.
        tokens: that it holds.
        num_bytes: of the session.
        seconds: that it took.
        messages: of the conversation that was saved with it; without any where it had none.
    """

    slot_id: str
    tokens: int
    num_bytes: int
    seconds: float
    messages: Messages


class Sessions:
    """A way to sessions with names, in one folder.

    They are what `cache.save` and `--save-session` write. Nobody but their users replaces or
    removes them. A prompt that begins as one does has it from there, as from any prefix.

    Args:
        session: makes caches.
        shelf: takes what is restored.
        folder: of the prefixes, and of these.
    """

    def __init__(self, session: Session, shelf: Shelf, folder: PrefixFolder) -> None:
        self._session = session
        self._shelf = shelf
        self._folder = folder

    def save(self, cache: OffloadedCache, name: str, messages: Messages | None) -> SavedSession:
        """Write a cache, and what was said.

        Args:
            cache: parked; closed at the end.
            name: of the session. One that is there is replaced once the new one is whole.
            messages: of a conversation, if it is one.

        Raises:
            OptionError: it is no name.
            SessionFileError: it cannot be written; what was there is whole.
        """
        with contextlib.closing(cache), self._unplaced():
            path = self._place(name)
            saved = cache.save(path, messages=messages)
            if messages is None:  # those of a conversation that had the name before
                (path / MESSAGES_NAME).unlink(missing_ok=True)
        self._note(path)
        return saved

    def restore(self, name: str) -> RestoredSession:
        """Have a session in memory again, as a slot that prompts go on from.

        Args:
            name: of the session. The tokens before a damage are used.

        Raises:
            OptionError: it is no name.
            SessionFileError: there is none, it is of another model, or nothing of it can be used.
            MemoryPlanError: it does not fit.
        """
        with self._unplaced():
            return self._restored(name)

    def _restored(self, name: str) -> RestoredSession:
        began_s = time.monotonic()
        path = self._place(name)
        index = read_index(path)
        if index.rows != 1 or not index.with_ids:
            raise SessionFileError(
                f"session {name!r} has {counted(index.rows, 'row')}, or no token ids; those of one "
                "prompt can be restored"
            )
        messages = Messages.read(os.fspath(path))
        self._shelf.make_room(self._session.host_bytes_for(index.tokens))
        cache = self._session.load_cache(path, None, partial=True)
        try:
            ids = cache.token_ids
            if ids is None or not cache.get_seq_length():
                raise SessionFileError(f"session {name!r} is damaged at its beginning")
            cache.park()
            kept = Kept(ids=ids[0], cache=cache, earliest_crop=cache.earliest_crop)
            self._note(path)
        except BaseException:
            cache.close()
            raise
        return RestoredSession(
            slot_id=self._shelf.add(kept).id,
            tokens=len(kept.ids),
            num_bytes=index.num_bytes,
            seconds=time.monotonic() - began_s,
            messages=messages,
        )

    @contextlib.contextmanager
    def _unplaced(self) -> Iterator[None]:
        """Leave the way to the folder out of errors: clients know sessions by their names."""
        try:
            yield
        except SessionFileError as error:
            told = str(error)
            for way in (os.path.realpath(self._folder.path), os.fspath(self._folder.path)):
                told = told.replace(os.path.join(way, ""), "")
                if os.path.isabs(way):
                    told = told.replace(way, os.path.basename(way))
            raise type(error)(told) from error.__cause__

    def _note(self, path: Path) -> None:
        """Have prompts go on from a session, where they do after a restart, too: by its name."""
        if is_prefix_name(path.name):
            described = self._folder.described(path, named=True)
            if described is not None:
                self._shelf.note_named(described)

    def fork(self, slot_id: str) -> OffloadedCache | None:
        """Return a cache with what a slot keeps, in memory or on the disk; None for no such slot.

        Raises:
            SessionFileError: what the disk has cannot be read.
        """
        with self._shelf.mutex:
            kept = next((each for each in self._shelf.kept if each.id == slot_id), None)
            if kept is not None:
                kept.busy += 1
            saved = next((each for each in self._shelf.saved if each.id == slot_id), None)
        if kept is not None:
            try:
                fork: OffloadedCache = kept.cache.fork()  # may wait for a turn
                return fork
            finally:
                with self._shelf.mutex:
                    kept.busy -= 1
        if saved is None:
            return None
        cache = self._shelf.load(saved)
        if cache is None:
            raise SessionFileError(f"slot {slot_id!r} cannot be read from the disk")
        cache.park()
        return cache

    def listed(self) -> list[NamedSession]:
        """Return each of this model's sessions that has a name, the newest first."""
        found = []
        for path in self._folder.path.iterdir():
            if is_own_name(path.name) or not path.is_dir() or not self._folder.has(path):
                continue
            try:
                index = read_index(path)
            except SessionFileError:
                continue
            if self._folder.is_ours(index):
                found.append(_named(path, index.tokens, index.num_bytes))
        return sorted(found, key=lambda each: -each.changed_s)

    def _place(self, name: str) -> Path:
        """Return the path of a session, which lies in the folder itself.

        Raises:
            OptionError: the name leads elsewhere, or is the server's own.
        """
        whole = self._folder.path / name
        plain = name == Path(name).name and name.isprintable() and not set(name) & set("/\\:")
        if not plain or name.startswith(".") or len(name) > _MOST_CHARS:
            raise OptionError(
                f"a session's name must be that of a folder without a path, of at most "
                f"{_MOST_CHARS} characters, not {name[:_MOST_CHARS]!r}"
            )
        if not self._folder.has(whole):
            raise OptionError(f"session {name!r} leads out of the session folder")
        if is_own_name(name):
            raise OptionError(f"session {name!r} has a name of the server's own; choose another")
        return whole


def _named(path: Path, tokens: int, num_bytes: int) -> NamedSession:
    return NamedSession(
        name=path.name,
        tokens=tokens,
        num_bytes=num_bytes,
        changed_s=changed_s(path / "index.json"),
        conversation=(path / MESSAGES_NAME).is_file(),
    )
