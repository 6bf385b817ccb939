"""One call of a model's `generate`, with a cache of ours: token ids in, text out as it comes."""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from headinfer.engine.stats import Stats
from headinfer.errors import OptionError, reason_of
from headinfer.generation.drafting import Drafting
from headinfer.generation.drafts import Drafts
from headinfer.generation.draws import OwnDraws, shared_ahead
from headinfer.generation.logits_check import LogitsCheck
from headinfer.generation.scores import TokenScores
from headinfer.generation.settings import Settings
from headinfer.generation.stop_criterion import StopCriterion
from headinfer.generation.stops import Stops
from headinfer.generation.text import TextCollector
from headinfer.integration.cache import OffloadedCache, PrefillProgress
from headinfer.integration.calls import cache_argument
from headinfer.session import Session

FinishReason = Literal["stop", "length", "time"]

Criterion = Callable[..., torch.Tensor]
"""Called after each token with ids `[rows, tokens]` and scores; returns `[rows]` of bool: stop."""

Processor = Callable[..., torch.Tensor]
"""Called before each token with ids `[rows, tokens]` and scores; returns scores."""


class Generation:
    """A call of a model's `generate`, in the thread that calls `run`.

    Args:
        model: attached.
        tokenizer: its.
        session: the attachment.
        settings: from `settle`.
        on_text: given each new piece of text, never empty; may raise to stop.
        cache: with nothing or the beginning of the prompt in it; it stays open. By default a new
            one is made and closed.
        progress: told of the prompt, after each chunk; may raise to stop.
        criteria: asked after each token whether to stop.
        stop: strings, none of them empty, before the first of which the text ends.
        processors: change the scores before each token; those of the settings come first.
        seed: of what is drawn; None to draw from torch's generator, which all threads share.
        logprobs: how many of the likeliest tokens to score beside each token of the answer; None
            for no scores. They are of one row.
        drafts: what the user says of drafting; None leaves it to the settings.

    Attributes:
        prompt_tokens: of the prompt.
        stats: times and memory of this call alone, so far.
        scores: those of the tokens so far; None where none were asked for.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        session: Session,
        settings: Settings,
        on_text: Callable[[str], None],
        *,
        cache: OffloadedCache | None = None,
        progress: PrefillProgress | None = None,
        criteria: Sequence[Criterion] = (),
        stop: Sequence[str] = (),
        processors: Sequence[Processor] = (),
        seed: int | None = None,
        logprobs: int | None = None,
        drafts: Drafts | None = None,
    ) -> None:
        self.prompt_tokens = 0
        self.stats = Stats()
        self._model = model
        self._tokenizer = tokenizer
        self._session = session
        self._settings = settings
        self._cache = cache
        self._progress = progress
        self._criteria = criteria
        self._processors = processors
        self._draws = None if seed is None else OwnDraws(seed)
        self.scores = None if logprobs is None else TokenScores(logprobs)
        self._drafts = drafts or Drafts()
        self._stops = Stops.of(stop, tokenizer)
        self._collector = TextCollector(
            tokenizer, on_text, self._raise_if_no_numbers, stops=self._stops
        )
        self._stop_strings: StopCriterion | None = None
        self._logits = LogitsCheck(str(model.dtype).removeprefix("torch."))

    @property
    def ids(self) -> list[int]:
        """The new tokens so far."""
        return self._collector.ids

    @property
    def text(self) -> str:
        """The text so far."""
        return self._collector.text

    def run(self, ids: list[int]) -> None:
        """Generate until the end.

        Args:
            ids: the prompt.

        Raises:
            OptionError: transformers refuses the settings.
            NotANumberError: the model's logits are no numbers.
            HeadInferError: the prompt does not fit.
        """
        if self._settings.max_time_s is not None and self._session.ranks.size > 1:
            raise OptionError(
                "max_time cannot be given where several ranks share the model: their clocks would "
                "stop them at different tokens; give max_new_tokens"
            )
        self.prompt_tokens = len(ids)
        where = self._model.device
        if where.type == "meta":  # accelerate brings what is there, and the tokens to it
            where = self._session.device.torch_device
        prompt = torch.tensor([ids], device=where)
        cache = self._cache
        if cache is None:
            cache = self._session.new_cache(len(ids) + self._settings.max_new_tokens)
        self.stats, cache.progress = cache.stats, self._progress
        try:
            drafting = self._drafting(cache)
            # Where drafts are verified, a call gives the scores of several tokens or of none.
            scores = self.scores if drafting is None else None
            watchers = self._logits, self._draws, scores
            cache.watchers = [each for each in watchers if each is not None]
            rows = self._generate(prompt, cache, drafting)
        except ValueError as error:
            if self.stats.prefill_tokens:
                raise
            # Raised before the model ran: transformers refuses these settings together.
            raise OptionError(self._refusal(error)) from error
        finally:
            cache.watchers = []
            if self._draws is not None:
                self._draws.leave()
            if cache is not self._cache:
                cache.close()
        if self._settings.rows > 1:
            self._collector.add(self._without_padding(rows[0, len(ids) :].tolist()))
        self.end()

    def end(self) -> None:
        """Hand on the text that was held back; may be called again, also after a failure."""
        self._collector.end()

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return self._settings.end_ids

    @property
    def stop(self) -> str | None:
        """The string that ended the text, if one did."""
        return self._collector.stop

    @property
    def finish_reason(self) -> FinishReason:
        """Why a call that ended by itself did: "stop", "time" or "length"."""
        ids, settings = self.ids, self._settings
        if self._collector.stopped or (ids and ids[-1] in settings.end_ids):
            return "stop"
        if self._stop_strings is not None and self._stop_strings.found:
            return "stop"
        out_of_time = settings.max_time_s is not None and len(ids) < settings.max_new_tokens
        return "time" if out_of_time else "length"

    def _drafting(self, cache: OffloadedCache) -> Drafting | None:
        """Return the loop of an answer with drafts; None where there are none."""
        session = self._session
        found = self._drafts.begin(self._model, self._settings, cache, session, self.prompt_tokens)
        if found is None:
            return None
        drafter, pace = found
        return Drafting(
            *(cache, drafter, pace, [cache.stats, session.stats]),
            ahead=shared_ahead if self._draws is None else self._draws.ahead,
            streamer=self._streamer(),
            note_logits=(lambda _logits: None) if self.scores is None else self.scores.note,
        )

    def _generate(
        self, prompt: torch.Tensor, cache: OffloadedCache, drafting: Drafting | None
    ) -> torch.Tensor:
        """Return the ids of prompt and answer, `[rows, tokens]`."""
        settings = self._settings
        keywords = dict(settings.keywords)
        given = keywords.pop("stopping_criteria", None) or ()
        criteria = StoppingCriteriaList([self._no_numbers_criterion, *self._criteria, *given])
        processors = [*(keywords.pop("logits_processor", None) or ()), *self._processors]
        if self._draws is not None:
            processors.append(self._draws.processor)
            criteria.insert(0, self._draws.criterion)
        if self._stops:
            criteria.append(StopCriterion(self._tokenizer, self._stops, prompt.shape[1]))
        if settings.stop_strings:
            kept = Stops.of(settings.stop_strings, self._tokenizer)
            self._stop_strings = StopCriterion(self._tokenizer, kept, prompt.shape[1])
            criteria.append(self._stop_strings)
            keywords["stop_strings"] = None
        streamer = self._streamer() if settings.rows == 1 else None
        if drafting is not None:
            keywords["custom_generate"] = drafting
            streamer = drafting.streamer
        keywords["prompt_lookup_num_tokens"] = None  # or transformers would draft
        model: Any = self._model
        rows: torch.Tensor = model.generate(
            input_ids=prompt,
            attention_mask=prompt.new_ones(prompt.shape),
            **cache_argument(model, cache),
            streamer=streamer,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=criteria,
            **keywords,
        )
        return rows

    def _streamer(self) -> Any:
        """Return what `generate` hands tokens to."""
        return self._collector if self.scores is None else _Scored(self._collector, self.scores)

    def _raise_if_no_numbers(self) -> None:
        self._logits.raise_if_noted(len(self.ids) if self._settings.rows == 1 else None)

    def _no_numbers_criterion(
        self, input_ids: torch.Tensor, _scores: Any, **_keywords: Any
    ) -> torch.Tensor:
        """Look at the logits as a stopping criterion that stops nothing."""
        self._raise_if_no_numbers()
        return input_ids.new_zeros(input_ids.shape[0], dtype=torch.bool)

    def _refusal(self, error: ValueError) -> str:
        """Return why transformers refuses the settings, and which of them are the model's own."""
        reason = reason_of(error)
        known = vars(self._model.generation_config)
        named = [name for name in re.findall(r"`(\w+)`", reason) if name in known]
        own = sorted({name for name in named if name not in self._settings.keywords})
        whose = f"; {', '.join(own)} is of the model's own generation config" if own else ""
        return f"these generation settings do not go: {reason}{whose}; give other ones"

    def _without_padding(self, ids: list[int]) -> list[int]:
        """Cut a beam after its end token."""
        for position, token_id in enumerate(ids):
            if token_id in self._settings.end_ids:
                return ids[: position + 1]
        return ids


class _Scored:
    """A streamer that has tokens scored before their text is written."""

    def __init__(self, collector: TextCollector, scores: TokenScores) -> None:
        self._collector = collector
        self._scores = scores
        self._prompt_is_next = True

    def put(self, value: Any) -> None:
        """Take token ids; those of the first call are the prompt."""
        if not self._prompt_is_next:
            self._scores.take(value.flatten().tolist())
        self._prompt_is_next = False
        self._collector.put(value)

    def end(self) -> None:
        """Write what was held back."""
        self._collector.end()
