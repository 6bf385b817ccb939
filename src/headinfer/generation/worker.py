"""A thread of its own for a model, because transformers' `generate` hands text on by a call."""

import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch

from headinfer.integration.cache import PrefillProgress
from headinfer.ranks.group import ALONE, Ranks

Record = TypeVar("Record")


class _StopError(Exception):
    """Nobody waits for the rest of an answer."""


class Worker(Generic[Record]):
    """A thread that runs a model, and the records it hands on to whoever waits for them.

    Attributes:
        ranks: processes that compute the model; one that stops early stops all of them.
    """

    def __init__(self) -> None:
        self.ranks: Ranks = ALONE
        self._records: queue.SimpleQueue[Record | BaseException | None] = queue.SimpleQueue()
        self._stop = threading.Event()

    def records(self, device: torch.device, work: Callable[[], None]) -> Iterator[Record]:
        """Yield what `work` hands on, and raise what it raises; stop it if the caller stops.

        Args:
            device: the model's, which becomes the current one of the thread, with its autocast.
            work: calls `hand_on`.
        """
        kind = device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def run() -> None:
            try:
                if kind == "cuda":
                    torch.cuda.set_device(device)  # each thread has its own, and it begins with 0
                with torch.autocast(kind, dtype, enabled):  # the same
                    work()
            except _StopError:
                self._records.put(None)
            except BaseException as error:
                self._records.put(error)
            else:
                self._records.put(None)

        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(run,), name="headinfer-generate")
        thread.start()
        try:
            while (record := self._records.get()) is not None:
                if isinstance(record, BaseException):
                    raise record
                yield record
        finally:
            self._stop.set()
            if thread is not threading.current_thread():  # a collector's work may be done anywhere
                thread.join()

    def hand_on(self, record: Record) -> None:
        """Give a record to whoever waits."""
        self._records.put(record)

    def _stopping(self) -> bool:
        """Whether nobody waits any more, which the end of the interpreter tells too."""
        return self.ranks.any(self._stop.is_set() or not threading.main_thread().is_alive())

    def report(self, progress: PrefillProgress | None, done_tokens: int, all_tokens: int) -> None:
        """Pass progress on, or end the prefill."""
        if self._stopping():
            raise _StopError
        if progress is not None:
            progress(done_tokens, all_tokens)

    def criterion(self, input_ids: torch.Tensor, _scores: Any, **_keywords: Any) -> torch.Tensor:
        """Stop all rows where nobody waits any more; `[rows]` of bool."""
        return input_ids.new_full((input_ids.shape[0],), self._stopping(), dtype=torch.bool)
