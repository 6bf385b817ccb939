"""The loop of an answer with drafts: draft some tokens, verify them in one pass, accept, go on.

transformers' `generate` prepares settings, processors and criteria, and hands over to this loop
(`custom_generate`). The loop asks them token by token, as plain decoding does. So they see each
token of the answer once, and none that was rejected.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from headinfer.engine.stats import Stats
from headinfer.generation.acceptance import Choice, accepted_tokens
from headinfer.generation.candidates import Drafter
from headinfer.generation.pace import MOST_DRAFTED, Pace
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.turns import waited_s


class Drafting:
    """A decoding loop for a model's `generate` with one row, as its `custom_generate`.

    Args:
        cache: of the answer.
        drafter: where drafts come from.
        pace: how many are drafted.
        stats: of whoever wants to know of drafts; times and numbers are added.
        ahead: returns a generator of the numbers that the answer will draw with next, on a device.
        streamer: given each token of the answer as it is accepted; None for nobody.
        note_logits: told the model's logits `[vocab]` for each token, before it is streamed.

    Attributes:
        streamer: as given; `generate` shows it the prompt.
    """

    def __init__(
        self,
        cache: OffloadedCache,
        drafter: Drafter,
        pace: Pace,
        stats: list[Stats],
        *,
        ahead: Callable[[torch.device], torch.Generator],
        streamer: Any = None,
        note_logits: Callable[[torch.Tensor], object] = lambda _logits: None,
    ) -> None:
        self._cache = cache
        self._drafter = drafter
        self._pace = pace
        self._stats = stats
        self._ahead = ahead
        self.streamer = streamer
        self._note_logits = note_logits

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Return prompt and answer, `[1, tokens]`; transformers says what the arguments are."""
        try:
            choice = Choice(processors=logits_processor, samples=bool(generation_config.do_sample))
            return self._answer(
                model, input_ids, choice, stopping_criteria, generation_config, model_kwargs
            )
        finally:
            self._pace.end()

    def _answer(
        self,
        own: Any,
        input_ids: torch.Tensor,
        choice: Choice,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        model_kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """Return prompt and answer of a model."""
        output = own._prefill(input_ids, generation_config, model_kwargs)
        answer = _Answer(self, input_ids, choice, stopping_criteria)
        answer.take(output.logits[:, -1:], [])
        model_kwargs = own._update_model_kwargs_for_generation(output, model_kwargs)
        del output  # the logits of a prompt may be large
        if not answer.ended:
            self._begin(answer.ids)
        with own._optimize_model_for_decode():
            while not answer.ended:
                left = generation_config.max_length - answer.ids.shape[1] - 1
                drafted = self._draft(answer.ids, choice, left)
                logits = self._verify(own, answer.ids, drafted, model_kwargs)
                taken = answer.take(logits, drafted)
                self._forget(len(drafted) - taken + 1)
                self._count(drafted, answer.ids[0, -taken:].tolist())
                model_kwargs = own._update_model_kwargs_for_generation(
                    {}, model_kwargs, num_new_tokens=taken
                )
        if self.streamer is not None:
            self.streamer.end()
        return answer.ids

    def _begin(self, ids: torch.Tensor) -> None:
        """Have the drafter hear of the prompt, and count how long that takes."""
        began_s = _own_s()
        if not self._drafter.begin(ids):
            return
        for stats in self._stats:
            stats.draft_read_s += _own_s() - began_s

    def _draft(self, ids: torch.Tensor, choice: Choice, left: int) -> list[int]:
        """Return tokens that may follow, none of them beyond the `left` that matter."""
        most = min(self._pace.number(ids.shape[1]), left, MOST_DRAFTED)
        if most < 1:
            return []
        own = self._cache.stats
        began_s, captured_s, counted_s = _own_s(), own.capture_s, own.draft_s
        ahead = choice.ahead(self._ahead(ids.device) if choice.samples else None)
        drafted = self._drafter.draft(ids, most, ahead)
        seconds = _own_s() - began_s - (own.capture_s - captured_s)
        counted_s = own.draft_s - counted_s  # by the model's calls with this cache
        self._pace.note_draft(len(drafted), seconds)
        for stats in self._stats:
            stats.draft_s += seconds - counted_s
            stats.decode_s += seconds
        return drafted

    def _verify(
        self, model: Any, ids: torch.Tensor, drafted: list[int], model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Pass the newest token and the drafts; return their logits, `[1, drafts + 1, vocab]`."""
        new_tokens = len(drafted) + 1
        keywords = dict(model_kwargs)
        if drafted:
            keywords = model._update_model_kwargs_for_generation(
                {}, keywords, num_new_tokens=len(drafted)
            )
            ids = torch.cat((ids, ids.new_tensor([drafted])), dim=1)
        inputs = model.prepare_inputs_for_generation(
            ids, next_sequence_length=new_tokens, **keywords
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = new_tokens
        before_s = self._cache.stats.decode_s
        with self._cache.verifying():
            logits: torch.Tensor = model(**inputs, return_dict=True).logits[:, -new_tokens:]
        seconds = self._cache.stats.decode_s - before_s
        self._pace.note_pass(len(drafted), seconds)
        if drafted:
            for stats in self._stats:
                stats.verify_s += seconds
        return logits

    def _forget(self, rejected: int) -> None:
        """Take rejected drafts back out of the cache."""
        if rejected:
            self._cache.crop(-rejected)

    def _count(self, drafted: list[int], taken: list[int]) -> None:
        """Count a verification that gave some tokens; an answer may end with a drafted one."""
        if not drafted:
            return
        accepted = accepted_tokens(drafted, taken)
        self._pace.note_accepted(accepted, rejected=accepted < min(len(drafted), len(taken)))
        for stats in self._stats:
            stats.verifications += 1
            stats.drafted_tokens += len(drafted)
            stats.accepted_tokens += accepted

    def hand_on(self, token: torch.Tensor, logits: torch.Tensor) -> None:
        """Have a token of the answer, `[1]`, heard of by those that listen."""
        self._note_logits(logits)
        if self.streamer is not None:
            self.streamer.put(token.cpu())


def _own_s() -> float:
    """Return a clock's seconds, which stand still while this thread waits for its turn."""
    return time.perf_counter() - waited_s()


class _Answer:
    """An answer so far, token by token.

    Attributes:
        ids: prompt and answer, `[1, tokens]`.
        ended: whether a criterion said so.
    """

    def __init__(
        self,
        drafting: Drafting,
        prompt: torch.Tensor,
        choice: Choice,
        criteria: StoppingCriteriaList,
    ) -> None:
        self.ids = prompt
        self.ended = False
        self._drafting = drafting
        self._choice = choice
        self._criteria = criteria

    def take(self, logits: torch.Tensor, drafted: list[int]) -> int:
        """Take tokens until a drafted one is wrong, or the answer ends; return how many.

        Args:
            logits: after the newest token and after each drafted one, `[1, drafts + 1, vocab]`.
            drafted: what the logits follow on.
        """
        for number in range(len(drafted) + 1):
            row = logits[:, number]
            token = self._choice.token(self.ids, row)
            self.ids = torch.cat((self.ids, token[:, None]), dim=1)
            self._drafting.hand_on(token, row[0])
            stop: Any = self._criteria(self.ids, None)
            self.ended = bool(stop.all())
            if self.ended or number == len(drafted) or int(token) != drafted[number]:
                break
        return number + 1
