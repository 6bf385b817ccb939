"""Greedy answers of a model under one method, several turns through one cache."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headinfer.bench.methods import Method
from headinfer.errors import OptionError
from headinfer.evaluate.answers.record import Answer
from headinfer.evaluate.answers.rewinding import Place, place_in, went_back
from headinfer.evaluate.divergence import tied

_WARM_UP_TOKENS, _WARM_UP_STEPS = 512, 3


def cut_middle(tokens: Sequence[int], most: int) -> list[int]:
    """Return the tokens of a prompt without its middle, so that at most `most` are left.

    What is kept is the first half and the last half, as LongBench and RULER's users cut prompts.

    Raises:
        OptionError: not even one token would be left.
    """
    if most < 1:
        raise OptionError(f"a prompt cut to {most} tokens is none; answers leave no room for it")
    if len(tokens) <= most:
        return list(tokens)
    last = most // 2
    return [*tokens[: most - last], *tokens[len(tokens) - last :]]


class Answerer:
    """A model that answers under one method.

    Args:
        model: in eval mode, on its device; attached where the method is ours.
        tokenizer: of transformers.
        method: in force.
        limit_tokens: the most tokens of prompt and answer that the method holds; None for any.

    Attributes:
        model: as given.
        tokenizer: as given.
        limit_tokens: as given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        method: Method,
        limit_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.limit_tokens = limit_tokens
        self._method = method
        self._end_tokens = _end_tokens(model, tokenizer)
        self._before_next_cache: Callable[[], object] | None = None

    def before_next_cache(self, call: Callable[[], object]) -> None:
        """Have something called once, right before the next cache is made."""
        self._before_next_cache = call

    def warm_up(self) -> None:
        """Answer a short prompt, so that no later call is the first of its kind."""
        tokens = [1] * _WARM_UP_TOKENS
        if self.limit_tokens is not None:
            tokens = tokens[: max(1, self.limit_tokens - _WARM_UP_STEPS)]
        self.answer(tokens, _WARM_UP_STEPS)

    def answer(
        self, prompt: Sequence[int], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Answer:
        """Answer one prompt through a cache of its own; one that is too long is cut.

        Args:
            prompt: token ids.
            max_new_tokens: the most tokens of the answer.
            stop: texts that end it, and are not part of it.
        """
        dialogue = self.dialogue(prompt, [([], max_new_tokens)])
        return dialogue.answer([], max_new_tokens, stop)

    def dialogue(
        self, context: Sequence[int], turns: Sequence[tuple[Sequence[int], int]]
    ) -> "Dialogue":
        """Begin several turns through one cache.

        Args:
            context: token ids before the first turn, cut where the method cannot hold them all.
            turns: token ids of each question to come, and the most tokens of its answer.
        """
        turns_tokens = sum(len(question) + new for question, new in turns)
        kept = list(context)
        if self.limit_tokens is not None:
            kept = cut_middle(kept, self.limit_tokens - turns_tokens)
        most = len(kept) + turns_tokens
        return Dialogue(self, lambda: self.new_cache(most), kept, len(context) - len(kept))

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache of the method, for up to so many tokens."""
        if self._before_next_cache is not None:
            call, self._before_next_cache = self._before_next_cache, None
            call()
        return self._method.new_cache(max_tokens)

    def prefill(self, tokens: Sequence[int], cache: Cache) -> torch.Tensor:
        """Pass tokens through the model by the method's way; return the last logits `[vocab]`."""
        ids = torch.tensor([tokens], device=self.model.device)
        return self._method.prefill(ids, cache)

    def step(self, token: int, cache: Cache) -> torch.Tensor:
        """Pass one token through the model; return its logits `[vocab]`."""
        return self._method.step(torch.tensor([[token]], device=self.model.device), cache)

    def ends(self, token: int) -> bool:
        """Whether a token is one that ends an answer."""
        return token in self._end_tokens

    def stops(self, tokens: Sequence[int], stop: Sequence[str]) -> bool:
        """Whether the text of an answer so far holds a stop text."""
        return bool(stop) and any(text in self._decode(tokens) for text in stop)

    def text(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        """Return the text of an answer up to its first stop text."""
        text = self._decode(tokens)
        for each in stop:
            text = text.split(each)[0]
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class Dialogue:
    """A conversation: questions and answers through one cache, kept from turn to turn.

    Args:
        answerer: of the model.
        new_cache: makes an empty one.
        context: token ids that pass through the model before the first question.
        cut_tokens: tokens that were cut from the context.
    """

    def __init__(
        self,
        answerer: Answerer,
        new_cache: Callable[[], Cache],
        context: list[int],
        cut_tokens: int,
    ) -> None:
        self._answerer = answerer
        self._new_cache = new_cache
        self._cache = new_cache()
        self._pending = context
        self._cut_tokens = cut_tokens
        self._passed: list[int] = []

    @property
    def kept_tokens(self) -> int:
        """Tokens that the cache holds."""
        return len(self._passed)

    @torch.no_grad()
    def read(self) -> float:
        """Pass what is still to pass, with no answer to it; return the seconds that it took."""
        start_s = time.perf_counter()
        if self._pending:
            int(self._pass([]).argmax())  # waits for the device
        return time.perf_counter() - start_s

    @torch.no_grad()
    def answer(
        self,
        question: Sequence[int],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        *,
        forget: bool = False,
    ) -> Answer:
        """Answer a question after all that was said before.

        The answer's own tokens stay in the cache; its last one passes with the next question.

        Args:
            question: token ids, after those that are still to pass.
            max_new_tokens: the most tokens of the answer.
            stop: texts that end it, and are not part of it.
            forget: whether the next question follows this one, as if nothing had been answered.
        """
        kept_tokens, read_tokens = self.kept_tokens, len(self._pending) + len(question)
        start_s = time.perf_counter()
        logits = self._pass(question)
        tokens, ties = [int(logits.argmax())], [self._tied(logits)]
        prefilled_s = time.perf_counter()
        place = self.place(max_new_tokens) if forget else None
        started_s = time.perf_counter()
        while not self._ended(tokens, max_new_tokens, stop):
            logits = self._answerer.step(tokens[-1], self._cache)
            self._passed.append(tokens[-1])
            tokens.append(int(logits.argmax()))  # waits for the device
            ties.append(self._tied(logits))
        ended_s = time.perf_counter()
        self._pending = [tokens[-1]]
        if place is not None:
            self.go_back(place, again=False)
        return Answer(
            text=self._answerer.text(tokens, stop),
            tokens=tuple(tokens),
            ties=tuple(ties),
            prompt_tokens=kept_tokens + read_tokens + self._cut_tokens,
            read_tokens=read_tokens,
            kept_tokens=kept_tokens,
            prefill_s=prefilled_s - start_s,
            decode_s=ended_s - started_s,
        )

    def place(self, most: int) -> Place:
        """Return where the cache is, to go back to; what is still to pass is no part of it.

        Args:
            most: the most tokens that will pass before it goes back.
        """
        return place_in(self._cache, self.kept_tokens, most)

    def go_back(self, place: Place, *, again: bool = True) -> None:
        """Forget all that passed since, so that another question can follow.

        Where the cache cannot, for lack of memory, all before the place passes once more with the
        next question.

        Args:
            place: of this conversation.
            again: whether it will be gone back to once more.
        """
        cache = went_back(self._cache, place, again=again)
        if cache is None:
            self._cache, self._pending = self._new_cache(), self._passed[: place.tokens]
            self._passed = []
        else:
            self._cache, self._pending = cache, []
            del self._passed[place.tokens :]

    def _pass(self, question: Sequence[int]) -> torch.Tensor:
        """Pass what is pending, and a question; return the last logits."""
        tokens = [*self._pending, *question]
        logits = self._answerer.prefill(tokens, self._cache)
        self._passed += tokens
        self._pending = []
        return logits

    def _ended(self, tokens: list[int], max_new_tokens: int, stop: Sequence[str]) -> bool:
        return (
            len(tokens) >= max_new_tokens
            or self._answerer.ends(tokens[-1])
            or self._answerer.stops(tokens, stop)
        )

    @staticmethod
    def _tied(logits: torch.Tensor) -> bool:
        return bool(tied(logits[None], logits.dtype))


def _end_tokens(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    given = model.generation_config.eos_token_id if model.generation_config else None
    several = given if isinstance(given, list) else [given]
    return {token for token in (*several, tokenizer.eos_token_id) if token is not None}
