"""One call of an attached model: its chunks, what it took, and its logits as a whole."""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from headinfer.device.base import Mark
from headinfer.device.launches import launches
from headinfer.engine.busy import BusyTimes
from headinfer.engine.parted import CacheEngine
from headinfer.engine.stats import Stats
from headinfer.errors import CacheStateError
from headinfer.integration.answer_room import AnswerRoom, is_short
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.chunking import Chunking, run_leading_chunks
from headinfer.integration.decode_call import verifies
from headinfer.integration.history import check_history, tell_of_repetition
from headinfer.integration.rotary import WholeCallPositions, last_position
from headinfer.plan.plan import Plan
from headinfer.ranks.group import Ranks, fingerprint
from headinfer.schedule.route import MAX_ASKED_TOKENS

_FEW_TOKENS = 32
"""A call with up to so many new tokens on a filled cache counts as decoding (it is speculative)."""


def _decodes(arguments: dict[str, Any], new_tokens: int) -> bool:
    """Whether a call on a filled cache decodes: it has one new token, or checks a few drafts."""
    return new_tokens == 1 or (new_tokens <= _FEW_TOKENS and verifies(arguments))


_BETWEEN_STEPS_S, _PAUSE_S = 0.005, 0.0005
"""How long one that answers may do without the model between two tokens, and how often to look."""


class AttachmentOwner(Protocol):
    """An owner of an attachment: what calls need of the session they are served by."""

    stats: Stats
    ranks: Ranks
    busy: BusyTimes
    answers: AnswerRoom

    def new_cache(self) -> OffloadedCache:
        """Return a cache for a call that brings none."""

    def owns(self, cache: OffloadedCache) -> bool:
        """Whether a cache belongs to this attachment."""

    def chunk_tokens(self, cache: OffloadedCache) -> int:
        """Return the tokens of a prefill chunk."""

    def plan_whole(self, cache: OffloadedCache, batch: int, tokens: int) -> Plan:
        """Make room for a call whose tokens cannot pass in chunks, or refuse."""

    @property
    def stages(self) -> int:
        """Devices that a chunk passes through, one after the other."""

    def mark_compute(self) -> Mark:
        """Return a mark behind the model's work so far."""

    def finish_compute(self) -> None:
        """Block until the model's work is done, and raise what failed in it."""

    def report_prefill(self, done_tokens: int, all_tokens: int) -> None:
        """Hear of progress."""

    def after_call(self, cache: OffloadedCache) -> None:
        """Hear of a call whose work is enqueued."""

    def note_memory(self, cache: OffloadedCache) -> None:
        """Count the memory held between two chunks: there may be no later one."""


class ServedCall:
    """A call with an offloaded cache, from `begin` until `end`, and then `leave` in any case.

    Args:
        owner: told of the call.
        chunking: which calls of the model may pass in chunks.
        forward: the model's own.
        cache: the call's.
        shape: rows and new tokens.
        rotary_modules: those of the model whose frequencies follow the length of a pass.

    Attributes:
        cache: the call's.
        thread: that makes the call.
    """

    def __init__(
        self,
        owner: AttachmentOwner,
        chunking: Chunking,
        forward: Callable[..., Any],
        cache: OffloadedCache,
        shape: tuple[int, int],
        *,
        rotary_modules: list[torch.nn.Module],
    ) -> None:
        self.cache = cache
        self._owner = owner
        self._chunking = chunking
        self._forward = forward
        self._rows, self._new_tokens = shape
        self._rotary_modules = rotary_modules
        self._positions: WholeCallPositions | None = None  # during a call in chunks
        self._started_s = 0.0
        self._captured_s = 0.0  # by the cache's captures before the call
        self._decoding = False
        self._drafting = cache.state.drafting
        self._sending: CacheEngine | None = None  # what a prompt's tokens are sent home by
        self._logits: list[torch.Tensor] = []
        self._chunks: list[tuple[Mark, int]] = []  # begun, with the tokens done after each
        self._ids: torch.Tensor | None = None
        self.thread = threading.get_ident()
        self._chunk_began_s = 0.0
        self._others_s = 0.0  # of their turns between chunks
        self._noted_tokens = 0  # new ones that the cache's history has

    def begin(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Make room for the tokens, and run all chunks but the last, whose arguments it returns."""
        past_tokens = self.cache.get_seq_length()
        ranks = self._owner.ranks
        if ranks.size > 1:
            sizes = self._rows, self._new_tokens, past_tokens
            ranks.check_same(fingerprint(arguments.get("input_ids"), *sizes))
        check_history(arguments, past_tokens, self._new_tokens)
        short = is_short(arguments, self._new_tokens)
        self.cache.state.prepare(self._rows, self._new_tokens, short=short)
        engine = self.cache.state.engine
        if engine is not None and not self._drafting:
            engine.send_late()  # what the call before has left
        if engine is not None and self._new_tokens > MAX_ASKED_TOKENS:
            self._sending = engine
            engine.sends_late = True
        self._decoding = past_tokens > 0 and _decodes(arguments, self._new_tokens)
        self._ids = arguments.get("input_ids")
        if past_tokens and not (self._decoding or self._drafting) and self._ids is not None:
            tell_of_repetition(self.cache, self._ids)
        chunk_tokens = self._owner.chunk_tokens(self.cache)
        if self._new_tokens > 1:  # or each rank would chunk as it has room
            (chunk_tokens,) = ranks.least(chunk_tokens)
        in_chunks = self._may_pass_in_chunks(arguments, chunk_tokens, past_tokens)
        if in_chunks and self._ids is not None:
            self._ids = self._ids.cpu()  # now, for between chunks the device would be waited for
        self._started_s = self._chunk_began_s = time.perf_counter()
        self._captured_s = self.cache.stats.capture_s
        self.cache.begin_call()
        self._owner.busy.take()  # what a call that failed has left
        if in_chunks:
            arguments = self._chunking.with_positions(arguments, past_tokens)
            if self._rotary_modules:
                last = last_position(arguments, past_tokens, self._new_tokens)
                self._positions = WholeCallPositions(last)
                self._positions.install(self._rotary_modules)
            arguments, self._logits = run_leading_chunks(
                *(self._forward, arguments),
                lambda: self._next_chunk(chunk_tokens, past_tokens),
                *(past_tokens, self._after_chunk),
                *(self._chunking.crossings, self._owner.busy.pause),
            )
        return arguments

    def _next_chunk(self, chunk_tokens: int, past_tokens: int) -> int:
        """Return the tokens of the next chunk: up to a mark, under the plan as it is now."""
        if self._owner.ranks.size == 1:  # else each rank would chunk as it has room
            chunk_tokens = self._owner.chunk_tokens(self.cache)
        done_tokens = past_tokens + self._noted_tokens
        to_marks = [mark - done_tokens for mark in self.cache.marks if mark > done_tokens]
        return min([chunk_tokens, *to_marks])

    def _may_pass_in_chunks(
        self, arguments: dict[str, Any], chunk_tokens: int, past_tokens: int
    ) -> bool:
        """Whether the call passes in several chunks; make room for all of it where it may not."""
        most = self._next_chunk(chunk_tokens, past_tokens) if self._new_tokens > 1 else 1
        if self._new_tokens <= most:
            return False
        obstacle = self._chunking.obstacle(self._forward, arguments, past_tokens)
        if obstacle is None:
            return True
        if self._new_tokens <= chunk_tokens:
            return False
        with self._chunking.passing_whole(obstacle, self._new_tokens, chunk_tokens):
            self._owner.plan_whole(self.cache, self._rows, self._new_tokens)
        return False

    def end(self, output: Any) -> Any:
        """Count the call, and join the logits of its chunks.

        The last chunk's residents stay the device's alone until the next call begins. The first
        token's copy to the host would wait behind theirs.

        Measured on an H100: 3.8 of the 39.5 ms that a prompt of 1K tokens took.
        """
        if self._positions is not None:
            self._positions.remove()
            self._positions.check()
        stopped: BaseException | None = None
        try:
            self._report_chunks(self._new_tokens, begun=0)
        except BaseException as error:  # all chunks are under way, and end before it is raised
            stopped = error
        self._owner.busy.pause()
        self._owner.after_call(self.cache)  # before the device is done: it has time for that
        self._owner.finish_compute()
        seconds = time.perf_counter() - self._started_s
        seconds -= self.cache.stats.capture_s - self._captured_s + self._others_s
        tokens = self._rows * self._new_tokens
        device_s = self._owner.busy.take()
        for stats in (self._owner.stats, self.cache.stats):
            if self._drafting:
                stats.draft_s += seconds
                stats.draft_steps += 1
            elif self._decoding:
                stats.decode_tokens += tokens
                stats.decode_s += seconds
                stats.decode_steps += 1
            else:
                stats.add_prefill(tokens, seconds, device_s)
        if not self._drafting:  # what is drafted will be forgotten
            self._note_tokens(self._new_tokens)
            self.cache.drafted_tokens = self._new_tokens - 1 if self._decoding else 0
        self.cache.end_call()
        if stopped is not None:
            raise stopped
        if not self._decoding:
            self._report(self._new_tokens, self._new_tokens)
        if self._logits:
            output.logits = torch.cat([*self._logits, output.logits], dim=1)
        return output

    def leave(self) -> None:
        """Leave the model and the cache as they were, also where the call failed."""
        if self._positions is not None:
            self._positions.remove()
        if self._sending is not None:
            self._sending.sends_late = False

    def _note_tokens(self, done_tokens: int) -> None:
        """Have the cache know which tokens it holds, so many of them new ones."""
        ids = self._ids
        if ids is not None:
            ids = ids[:, self._noted_tokens : done_tokens]
        self.cache.history.append(ids)
        self._noted_tokens = done_tokens

    def _after_chunk(self, done_tokens: int, all_tokens: int) -> None:
        self._owner.busy.pause()
        if self._sending is not None:  # now that all kernels of the chunk are launched
            self._sending.send_late()
        self._chunks.append((self._owner.mark_compute(), done_tokens))
        self._note_tokens(done_tokens)
        self._owner.note_memory(self.cache)
        # All layers hold the same tokens: who stops here can go on with what was read.
        self.cache.end_call()
        self._report_begun(all_tokens)
        self.cache.begin_call()

    def _report_begun(self, all_tokens: int) -> None:
        # The next chunk is begun while each device computes one before it, so that none waits.
        begun = self._owner.stages
        suspended = (
            contextlib.nullcontext() if self._positions is None else self._positions.suspended()
        )
        # Who hears of progress may call the model, as may other threads.
        with suspended, self._owner.busy.suspended(), launches.paused():
            self._report_chunks(all_tokens, begun=begun)
            self._let_others(all_tokens)

    def _let_others(self, all_tokens: int) -> None:
        """Let other threads have their turns, with nothing of this call under way.

        They have as long as the chunk took, if they ask for so long. With one step for each chunk
        an answer would come at the pace of somebody else's chunks.
        """
        turns = self.cache.turns
        if self._owner.ranks.size > 1 or not turns.awaited():  # ranks make the same calls in order
            self._chunk_began_s = time.perf_counter()
            return
        self._owner.finish_compute()
        self._report_chunks(all_tokens, begun=0)
        held, left_s = self.cache.get_seq_length(), time.perf_counter()
        until_s, asked_s = 2 * left_s - self._chunk_began_s, left_s
        while (now_s := time.perf_counter()) < until_s:
            if turns.awaited():
                turns.pass_on()
                asked_s = time.perf_counter()
            elif now_s - asked_s < _BETWEEN_STEPS_S:
                turns.pass_on(_PAUSE_S)
            else:
                break
        self._chunk_began_s = time.perf_counter()
        self._others_s += self._chunk_began_s - left_s
        if self.cache.get_seq_length() != held:
            raise CacheStateError(
                "another thread changed this cache between two chunks of a call; use one cache a "
                "thread"
            )

    def _report_chunks(self, all_tokens: int, *, begun: int) -> None:
        """Report and forget the chunks that are done, waiting for all but the newest `begun`."""
        chunks = self._chunks
        early = self._owner.ranks.size == 1  # else what hears of it may wait for other ranks
        while chunks and (len(chunks) > begun or (early and chunks[0][0].reached)):
            mark, done_tokens = chunks.pop(0)
            mark.wait()
            self._report(done_tokens, all_tokens)

    def _report(self, done_tokens: int, all_tokens: int) -> None:
        """Tell the cache's user and the attachment's; each may raise."""
        if self.cache.progress is not None:
            self.cache.progress(done_tokens, all_tokens)
        self._owner.report_prefill(done_tokens, all_tokens)
