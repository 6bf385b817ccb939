"""Answers with an assistant's drafts, where a clock of the test's own says what passes take."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache

import headinfer
from headinfer.integration.calls import CACHE_NAMES
from saved_models import make_tokenizer
from tiny_models import VOCAB, random_tokens, tiny_model

PROMPT: list[int] = random_tokens(1, 40)[0].tolist()
TOKENIZER = make_tokenizer(VOCAB)


class Clock:
    """A clock that stands still but where a model runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(time, "perf_counter", self)

    def __call__(self) -> float:
        return self.now_s


class TimedAnswers:
    """A model that answers with the drafts of an assistant.

    Args:
        clock: tells the time.
        right: whether the assistant's next draft is, for each token of an answer.
        pass_s: seconds of a pass of so many tokens.
        draft_s: seconds of one draft.
    """

    def __init__(
        self, clock: Clock, right: Sequence[bool], pass_s: Callable[[int], float], draft_s: float
    ) -> None:
        self.clock, self.right, self.pass_s, self.draft_s = clock, right, pass_s, draft_s
        self.model, self.assistant = tiny_model("llama3"), tiny_model("llama3")
        self.assistant.load_state_dict(self.model.state_dict())
        self.model.get_input_embeddings().register_forward_hook(self._passes)
        self.assistant.register_forward_hook(self._drafts, with_kwargs=True)
        self._numbers: list[int] = []
        self._prompt_tokens = 0

    def drafted(
        self, tokens: int, prompt: Sequence[int] = PROMPT, assistant: Any = None, **settings: Any
    ) -> list[int]:
        """Return how many tokens were drafted for each pass of an answer of so many tokens.

        The prompt's passes and the last one, for which fewer are left, are left out.
        """
        keywords = {"tokenizer": TOKENIZER, "max_new_tokens": tokens, **settings}
        plain = [record.text for record in headinfer.generate(self.model, [*prompt], **keywords)]
        self._numbers.clear()
        self._prompt_tokens = len(prompt)
        keywords["assistant"] = assistant or self.assistant
        records = list(headinfer.generate(self.model, [*prompt], **keywords))
        assert "".join(record.text for record in records) == "".join(plain)
        last = records[-1]
        numbers = self._numbers[-(last.tokens - 1 - last.accepted_tokens) :]
        assert last.drafted_tokens == sum(numbers)
        assert last.verifications == sum(number > 0 for number in numbers)
        return numbers[:-1]

    def _passes(self, _layer: Any, given: tuple[torch.Tensor], _output: Any) -> None:
        self._numbers.append(given[0].shape[1] - 1)
        self.clock.now_s += self.pass_s(given[0].shape[1])

    def _drafts(self, _model: Any, _given: Any, keywords: dict[str, Any], output: Any) -> Any:
        self.clock.now_s += self.draft_s
        cache: Cache = next(keywords[name] for name in CACHE_NAMES if name in keywords)
        answered = cache.get_seq_length() - self._prompt_tokens
        if answered >= 0 and not self.right[answered]:
            output.logits = -output.logits
        return output
