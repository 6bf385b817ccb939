"""The index of a saved session: what it holds, in which files, and of which model."""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from headinfer.errors import SessionFileError
from headinfer.saved.fingerprint import Fingerprint

INDEX_NAME = "index.json"
FORMAT = 1
"""Raised when what is written can no longer be read by the programs before."""

_KIND = "headinfer session"
_CHECKSUM = "crc32"
_FILE = re.compile(r"[0-9a-f]{8}-(?:\d{6,}|states)\.safetensors")

_Kind = TypeVar("_Kind")


def is_page_name(name: str) -> bool:
    """Whether a file may be one of a session's, by its name."""
    return _FILE.fullmatch(name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """An entry of one file.

    Attributes:
        file: its name in the folder.
        num_bytes: its size.
        crc32: of all its bytes.
    """

    file: str
    num_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A page: some consecutive tokens in all layers that keep every token.

    Attributes:
        start: position of the first token.
        tokens: number of tokens.
        entry: the file they are in.
    """

    start: int
    tokens: int
    entry: FileEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """An index of one session.

    Attributes:
        rows: of the cache.
        tokens: of each row.
        with_ids: whether the pages hold token ids.
        kv_dtype: of keys and values.
        computed_dtype: in which the model computes them, where that is not its own dtype.
        tracks: for each layer that attends, its heads by how far back they see.
        pages: the tokens, in order and without a gap.
        states: the file of windows and recurrent states; None where the model has none.
        state_values: what these states have beside tensors, by layer and attribute.
        model: whose session it is.
        rounded: the form in which its tokens were rounded before they were saved; None where they
            are as they were computed.
        messages_crc32: of the messages that were saved with it; None where none were.
    """

    rows: int
    tokens: int
    with_ids: bool
    kv_dtype: str
    computed_dtype: str | None
    tracks: list[list[dict[str, Any]]]
    pages: tuple[Page, ...]
    states: FileEntry | None
    state_values: dict[str, Any]
    model: Fingerprint
    rounded: str | None = None
    messages_crc32: int | None = None

    @property
    def files(self) -> list[FileEntry]:
        """All files of the session."""
        states = [] if self.states is None else [self.states]
        return [*(page.entry for page in self.pages), *states]

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(entry.num_bytes for entry in self.files)

    def to_json(self, written_by: dict[str, str]) -> str:
        """Return the text of the index, with its own checksum.

        Args:
            written_by: versions of programs, for whoever reads it.
        """
        body = {"kind": _KIND, "format": FORMAT, "written_by": written_by, **asdict(self)}
        return json.dumps({_CHECKSUM: _checksum(body), **body}, indent=1)


def parse_index(text: bytes, name: str) -> Index:
    """Return the index that a file holds.

    Args:
        text: all of the file.
        name: of the session, for messages.

    Raises:
        SessionFileError: it is none, is damaged, or of a format that is not known here.
    """
    try:
        body = json.loads(text)
    except ValueError as error:
        raise SessionFileError(
            f"session {name!r} is damaged: its {INDEX_NAME} is not JSON"
        ) from error
    if not isinstance(body, dict) or body.get("kind") != _KIND:
        raise SessionFileError(f"{name!r} is not a session: its {INDEX_NAME} is of another program")
    if body.get("format") != FORMAT:
        raise SessionFileError(
            f"session {name!r} has format {body.get('format')!r}, and this version reads format "
            f"{FORMAT}; use the version that wrote it, {body.get('written_by')}"
        )
    if body.pop(_CHECKSUM, None) != _checksum(body):
        raise SessionFileError(
            f"session {name!r} is damaged: its {INDEX_NAME} does not have the checksum it names"
        )
    return _index_of(body, name)


def _index_of(body: dict[str, Any], name: str) -> Index:
    for key in ("kind", "format", "written_by"):
        body.pop(key, None)
    try:
        pages = tuple(
            Page(**{**page, "entry": FileEntry(**page["entry"])}) for page in body.pop("pages")
        )
        states = _if_given(lambda value: FileEntry(**value), body.pop("states"))
        index = Index(**{**body, "model": Fingerprint(**body["model"])}, pages=pages, states=states)
    except (KeyError, TypeError) as error:
        raise SessionFileError(
            f"session {name!r} is damaged: its {INDEX_NAME} lacks something ({error})"
        ) from error
    end = 0
    for page in index.pages:
        if page.start != end or page.tokens < 1 or not is_page_name(page.entry.file):
            raise SessionFileError(f"session {name!r} is damaged: its pages do not follow")
        end += page.tokens
    if end != index.tokens:
        raise SessionFileError(f"session {name!r} is damaged: its pages are not all tokens")
    return index


def _if_given(make: Callable[[Any], _Kind], value: Any) -> _Kind | None:
    return None if value is None else make(value)


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
