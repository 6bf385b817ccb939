"""One request, from its place in the queue to its end, in a thread of its own."""

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from headinfer.errors import CacheStateError, HeadInferError, reason_of
from headinfer.generation.call import Generation
from headinfer.generation.settings import Settings, settle
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.memory_held import held_by
from headinfer.integration.token_history import common_prefix
from headinfer.serving.ask import Ask
from headinfer.serving.events import (
    Ended,
    EndReason,
    Event,
    Piece,
    Progress,
    Queued,
    TokenScore,
    Usage,
)
from headinfer.serving.kept import Lent, as_ids
from headinfer.serving.prefixes import Prefixes
from headinfer.serving.queueing import Line
from headinfer.serving.slots import SlotState
from headinfer.session import Session

_logger = logging.getLogger(__name__)

_SEED_BITS = 63


class CancelledError(Exception):
    """Nobody waits for the rest of an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model that is served, with what its requests share.

    Attributes:
        model: attached.
        tokenizer: its.
        session: the attachment.
        prefixes: caches of requests before.
        line: who waits and who runs.
    """

    model: PreTrainedModel
    tokenizer: Any
    session: Session
    prefixes: Prefixes
    line: Line


class Request:
    """A request that has a place in the line; `start` has its thread begin.

    Args:
        served: the model.
        ask: what is asked; checked.
        on_event: told what happens, from the request's thread; one that raises cancels it.
        on_end: called when all is told.

    Attributes:
        id: of the request.
    """

    def __init__(
        self,
        served: Served,
        ask: Ask,
        on_event: Callable[[Event], None],
        on_end: Callable[[str], None],
    ) -> None:
        self.id = secrets.token_hex(8)
        self._served = served
        self._ask = ask
        self._on_event = on_event
        self._on_end = on_end
        self._cancelled = threading.Event()
        self._ended: Ended | None = None
        self._done = threading.Event()
        self._lent: Lent | None = None
        self._generation: Generation | None = None
        self._progress: Progress | None = None
        self._deaf = False
        self._cut_short = False
        self._began_s = 0.0
        self._thread = threading.Thread(
            target=self._run, name=f"headinfer-request-{self.id}", daemon=True
        )

    def start(self) -> None:
        """Begin, or wait in the line."""
        self._thread.start()

    def cancel(self) -> None:
        """Have it end between two tokens or chunks; what was read stays kept."""
        self._cancelled.set()
        self._served.line.notice()

    def wait(self, timeout_s: float | None = None) -> Ended | None:
        """Block until it has ended, and return how; None where that takes longer."""
        if not self._done.wait(timeout_s):
            return None
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return self._ended

    @property
    def state(self) -> SlotState:
        """What it holds now."""
        position, lent = self._served.line.position(self), self._lent
        if position is not None or lent is None:
            return SlotState(id=self.id, state="waiting", position=position)
        generation = self._generation
        held = held_by(lent.cache)
        return SlotState(
            id=self.id,
            state="running",
            tokens=held.tokens,
            device_bytes=held.device_bytes,
            host_bytes=held.host_bytes,
            progress=self._progress,
            completion_tokens=0 if generation is None else len(generation.ids),
        )

    def fork(self) -> OffloadedCache | None:
        """Return a cache with what it holds so far; None where it holds nothing, or has ended."""
        lent = self._lent
        if lent is None or not held_by(lent.cache).tokens:
            return None
        try:
            fork: OffloadedCache = lent.cache.fork()
        except CacheStateError:
            return None
        generation = self._generation
        known = [*self._ask.ids, *(() if generation is None else generation.ids)]
        if fork.token_ids is not None:  # drafts that were not yet verified are none of the answer's
            drafted = fork.get_seq_length() - common_prefix(fork.token_ids[0], as_ids(known))
            if drafted:
                fork.crop(-drafted)
        return fork

    def _run(self) -> None:
        line = self._served.line
        try:
            if line.wait(self, self._cancelled.is_set, lambda place: self._tell(Queued(place))):
                ended = self._answered()
            else:
                ended = self._end("cancelled")
        except BaseException as error:
            ended = self._end("error", self._told(error))
        line.leave(self)
        self._ended = ended
        self._tell(ended)
        self._on_end(self.id)
        self._done.set()

    def _told(self, error: BaseException) -> HeadInferError:
        """Return an error that clients may be told; others are for the log."""
        if isinstance(error, HeadInferError):
            return error
        _logger.error("request %s failed", self.id, exc_info=error)
        return HeadInferError(f"the request failed: {reason_of(error)}")

    def _tell(self, event: Event) -> None:
        if self._deaf:
            return
        try:
            self._on_event(event)
        except Exception:
            _logger.exception("request %s: whoever hears of it failed; it is cancelled", self.id)
            self._deaf = True
            self._cancelled.set()

    def _answered(self) -> Ended:
        """Answer, and return how that ended; the cache is given back before."""
        device = self._served.session.device.torch_device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own, and it begins with 0
        self._began_s = time.perf_counter()
        ask, served = self._ask, self._served
        given = {"num_beams": 1, **ask.given}
        settings = settle(given, served.model.generation_config, len(ask.ids))
        lent = self._lent = served.prefixes.lend(
            *(ask.ids, settings.max_new_tokens, ask.marks), self._cancelled.is_set
        )
        lent.id = self.id
        keep = False
        try:
            with contextlib.suppress(CancelledError):
                self._report(lent.cached_tokens)
                self._generate(lent, settings)
            keep = True
        finally:
            served.prefixes.give_back(lent, keep=keep)
        return self._end(self._reason(settings))

    def _generate(self, lent: Lent, settings: Settings) -> None:
        """Run the model until the answer ends by itself, or nobody waits for it."""
        ask, served = self._ask, self._served
        generation = self._generation = Generation(
            *(served.model, served.tokenizer, served.session, settings, self._write),
            cache=lent.cache,
            progress=lambda done, _of: self._report(lent.cached_tokens + done),
            criteria=[self._criterion],
            stop=ask.stop,
            processors=() if ask.processors is None else ask.processors(),
            seed=secrets.randbits(_SEED_BITS) if ask.seed is None else ask.seed,
            logprobs=ask.logprobs,
        )
        generation.run(list(ask.ids))
        if generation.stop is None:
            self._write("")

    def _reason(self, settings: Settings) -> EndReason:
        """Return why the answer ended; one that was complete is not cancelled any more."""
        generation = self._generation
        if generation is None:
            return "cancelled"
        whole = len(generation.ids) >= settings.max_new_tokens
        if self._cut_short and not whole and generation.finish_reason != "stop":
            return "cancelled"
        return generation.finish_reason

    def _report(self, processed: int) -> None:
        """Tell of the prompt's progress, or stop between two chunks."""
        lent = self._lent
        assert lent is not None
        if self._progress is None or processed > self._progress.processed:
            self._progress = Progress(
                total=len(self._ask.ids),
                cached=lent.cached_tokens,
                processed=processed,
                time_ms=1000 * (time.perf_counter() - self._began_s),
            )
            self._tell(self._progress)
        self._served.prefixes.note_progress(lent, processed)
        if self._cancelled.is_set():
            self._cut_short = True
            raise CancelledError

    def _criterion(self, input_ids: torch.Tensor, _scores: Any, **_keywords: Any) -> torch.Tensor:
        """Stop the row where the request was cancelled; `[1]` of bool."""
        self._cut_short = self._cancelled.is_set()
        return input_ids.new_full((input_ids.shape[0],), self._cut_short, dtype=torch.bool)

    def _write(self, text: str) -> None:
        """Tell of new text, or of what is left of the scores at the end."""
        generation = self._generation
        assert generation is not None
        scores = tuple(self._named(generation))
        if text or scores:
            self._tell(Piece(text, scores))

    def _named(self, generation: Generation) -> list[TokenScore]:
        """Return the scores of tokens that were taken since, but for those that end the answer."""
        taken = [] if generation.scores is None else generation.scores.drain()
        return [
            TokenScore(
                token_id=score.token_id,
                text=self._text_of(score.token_id),
                logprob=score.logprob,
                top=tuple((each, self._text_of(each), logprob) for each, logprob in score.top),
            )
            for score in taken
            if score.token_id not in generation.end_ids
        ]

    def _text_of(self, token_id: int) -> str:
        return str(self._served.tokenizer.decode([token_id], clean_up_tokenization_spaces=False))

    def _end(self, reason: EndReason, error: HeadInferError | None = None) -> Ended:
        generation, lent = self._generation, self._lent
        usage = Usage(
            prompt_tokens=len(self._ask.ids),
            cached_tokens=0 if lent is None else lent.cached_tokens,
            completion_tokens=0 if generation is None else len(generation.ids),
            prefill_s=0.0 if generation is None else generation.stats.prefill_s,
            decode_s=0.0 if generation is None else generation.stats.decode_s,
            drafted_tokens=0 if generation is None else generation.stats.drafted_tokens,
            accepted_tokens=0 if generation is None else generation.stats.accepted_tokens,
        )
        stop = None if generation is None else generation.stop
        return Ended(reason, usage, stop, error, None if lent is None else lent.slot_id)
