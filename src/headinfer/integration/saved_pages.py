"""Pages of a session that hold the tokens of a cache already, and need not be written again."""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from headinfer.errors import SessionFileError
from headinfer.saved.folder import read_index
from headinfer.saved.index import Index, Page
from headinfer.saved.writer import SessionWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedPages:
    """A record of pages on the disk that hold the first tokens of a cache, bit for bit.

    Attributes:
        folder: of the session, by its real path.
        pages: in order and without a gap.
    """

    folder: str
    pages: tuple[Page, ...]

    @classmethod
    def of(cls, path: str | os.PathLike[str], index: Index) -> "SavedPages":
        """Return the record of a session that was just written or read as a whole."""
        return cls(folder=_real(path), pages=index.pages)

    def cropped(self, tokens: int) -> "SavedPages":
        """Return the record of a cache that was cropped to so many tokens."""
        pages = tuple(page for page in self.pages if page.start + page.tokens <= tokens)
        return replace(self, pages=pages)

    def still_there(self, least_tokens: int) -> tuple[Page, ...]:
        """Return the pages that a save need not write.

        Others may have saved to the folder since.

        Args:
            least_tokens: of a page. From one with fewer on all are written again, so that a session
                which grows often has few files.
        """
        with contextlib.suppress(SessionFileError):
            return _leading(self.pages, read_index(self.folder).pages, least_tokens)
        return ()

    def reuse(self, writer: SessionWriter, least_tokens: int) -> tuple[Page, ...]:
        """Have a session begin with these pages as far as they are there; return them.

        A session in another folder shares the files. Where a file system cannot, none are used.
        """
        pages = self.still_there(least_tokens)
        return pages if writer.share(Path(self.folder), [page.entry for page in pages]) else ()


def _real(path: str | os.PathLike[str]) -> str:
    return os.path.realpath(os.fsdecode(os.fspath(path)))


def _leading(
    pages: tuple[Page, ...], there: tuple[Page, ...], least_tokens: int
) -> tuple[Page, ...]:
    """Return the first pages that are the same in both, none of them too small."""
    same = 0
    for page, other in zip(pages, there, strict=False):
        if page != other or page.tokens < least_tokens:
            break
        same += 1
    return pages[:same]
