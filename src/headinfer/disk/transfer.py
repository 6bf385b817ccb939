"""Reads and writes that are under way."""

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait

from headinfer.errors import DiskError


class Transfer:
    """A read or a write that may still go on; its memory must stay as it is until it is done.

    Args:
        parts: of it, each in a thread.
        refusal: makes the error for a part that failed.

    Attributes:
        told: whether somebody was told that it failed.
    """

    told = False

    def __init__(
        self, parts: Sequence[Future[None]], refusal: Callable[[BaseException], DiskError]
    ) -> None:
        self._parts = parts
        self._refusal = refusal

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return all(part.done() for part in self._parts)

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not well."""
        return self.done() and any(
            part.cancelled() or part.exception() is not None for part in self._parts
        )

    def cancel(self) -> None:
        """Have parts that have not begun never begin."""
        for part in self._parts:
            part.cancel()

    def then(self, work: Callable[[], None]) -> None:
        """Call a function once all of it has ended: now, or in the thread of its last part."""
        running = self._running()
        if running:  # each part is asked after the one before, so that the last one calls it
            running[0].add_done_callback(lambda _: self.then(work))
        else:
            work()

    def settle(self) -> None:
        """Block until all of it has ended, well or not."""
        wait(self._running())

    def wait(self) -> None:
        """Block until all of it has ended, also where Ctrl-C comes meanwhile.

        Its memory, and its place in the file, are in use no more.

        Raises:
            DiskError: a part failed.
        """
        try:
            wait(self._running())
        except BaseException:
            self.settle()
            raise
        for part in self._parts:
            try:
                part.result()
            except (OSError, EOFError, CancelledError) as error:
                self.told = True
                raise self._refusal(error) from error

    def _running(self) -> list[Future[None]]:
        """Return the parts that have not ended; nobody is told of those that a closed file ends."""
        return [part for part in self._parts if not part.done()]
