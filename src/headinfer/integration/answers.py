"""Whether a cache's answer is worth a plan of its own, with more resident tokens than its prompt's.

While an answer is made, nearly none of the memory is in use that a prompt's activations take. A
plan for answers has resident tokens there. To change plans is to fetch all resident tokens anew,
and once more when the next prompt comes. How long an answer gets is not known. So a cache changes
as soon as its steps have streamed as many bytes in vain as that takes. It never loses more than
twice what the best choice would have lost.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from headinfer.engine.engine import Engine
from headinfer.engine.parted import CacheEngine
from headinfer.plan.plan import Plan
from headinfer.schedule.route import MAX_ASKED_TOKENS

if TYPE_CHECKING:
    from headinfer.integration.answer_room import AnswerRoom


def end_answer(engine: Engine) -> None:
    """Have a cache's layers on one device go back to their plan for prompts."""
    if engine.plan.prompt_plan is not None:
        with engine.in_use():
            engine.end_answer()


@dataclass(slots=True)
class _Watch:
    """A count of the bytes that are streamed in vain on one device.

    Attributes:
        plan: under which they are.
        answer: with which they would not be; None for none.
        lost_bytes: streamed so far.
    """

    plan: Plan
    answer: Plan | None
    lost_bytes: float = 0.0

    def cost_bytes(self, tokens: int) -> int:
        """Return the bytes of resident tokens that come over the link when plans change and back.

        Args:
            tokens: that each row has.
        """
        assert self.answer is not None
        all_bytes = self.plan.shape.host_kv_bytes(tokens, self.plan.batch)
        streamed = self.plan.streamed_bytes(tokens) + self.answer.streamed_bytes(tokens)
        return 2 * all_bytes - streamed

    def loss_bytes(self, tokens: int) -> int:
        """Return the bytes that one step streams or has the host attend in vain."""
        assert self.answer is not None
        return self.plan.streamed_bytes(tokens) - self.answer.streamed_bytes(tokens)


class AnswerPlans:
    """A watch on one cache's calls, which changes between its plans for prompts and for answers.

    Args:
        room: of the attachment.
    """

    def __init__(self, room: "AnswerRoom") -> None:
        self._room = room
        self._watches: dict[int, _Watch] = {}  # by the number of the device
        self._refused = False  # whether there was no memory once

    def begin_call(self, cache_engine: CacheEngine, new_tokens: int, *, short: bool) -> None:
        """Change plans before a call, where that is due.

        Args:
            cache_engine: of the cache.
            new_tokens: of each row.
            short: see `is_short`.
        """
        if not short:
            self._watches.clear()
            for engine in cache_engine.parts:
                end_answer(engine)
        elif new_tokens <= MAX_ASKED_TOKENS:  # longer calls compute for longer than they stream
            for number, engine in enumerate(cache_engine.parts):
                self._count(cache_engine, number, engine, new_tokens)

    def begin(self, cache_engine: CacheEngine) -> None:
        """Change to the plans for answers now, as steps do after a while, where they are free."""
        for number, engine in enumerate(cache_engine.parts):
            if engine.plan.prompt_plan is None:
                self._begin(cache_engine, engine, self._watch(number, engine).answer)

    def _watch(self, number: int, engine: Engine) -> _Watch:
        """Return the watch on a device, anew where its plan has changed."""
        watch = self._watches.get(number)
        if watch is None or watch.plan is not engine.plan:
            watch = self._watches[number] = _Watch(engine.plan, self._room.plan(engine))
        return watch

    def _begin(self, cache_engine: CacheEngine, engine: Engine, answer: Plan | None) -> bool:
        """Change to a plan for answers; return whether nobody else needs the memory."""
        if answer is None or self._refused:
            return False
        if not self._room.is_free(cache_engine, engine, answer):
            return False
        with engine.in_use():
            self._refused = not engine.begin_answer(answer)
        return True

    def _count(
        self, cache_engine: CacheEngine, number: int, engine: Engine, new_tokens: int
    ) -> None:
        """Count what a call streams in vain on a device; change plans first where that is due."""
        if engine.plan.prompt_plan is not None:
            if not self._room.is_assisted_as(engine, engine.plan):
                end_answer(engine)
            return
        watch = self._watch(number, engine)
        if watch.answer is None or self._refused:
            return
        tokens = engine.held_tokens
        loss_bytes = watch.loss_bytes(tokens)
        due = loss_bytes > 0 and watch.cost_bytes(tokens) <= watch.lost_bytes
        if not (due and self._begin(cache_engine, engine, watch.answer)):
            watch.lost_bytes += loss_bytes * (1 - engine.host_share_at(new_tokens))
