"""Reads and writes that are under way."""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait

from headinfer.errors import DiskError


class Transfer:
    """A read or a write that may still go on; its memory must stay as it is until it is done.

    Args:
        parts: of it, each in a thread.
        refusal: makes the error for a part that failed.
    """

    def __init__(
        self, parts: Sequence[Future[None]], refusal: Callable[[BaseException], DiskError]
    ) -> None:
        self._parts = parts
        self._refusal = refusal

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return all(part.done() for part in self._parts)

    def settle(self) -> None:
        """Block until all of it has ended, well or not."""
        wait(self._parts)

    def wait(self) -> None:
        """Block until all of it has ended, also where Ctrl-C comes meanwhile.

        Its memory, and its place in the file, are in use no more.

        Raises:
            DiskError: a part failed.
        """
        try:
            wait(self._parts)
        except BaseException:
            self.settle()
            raise
        for part in self._parts:
            try:
                part.result()
            except (OSError, EOFError, CancelledError) as error:
                raise self._refusal(error) from error
