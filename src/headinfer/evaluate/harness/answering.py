"""A model under any method of the benchmarks, as the harness's tasks ask it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from transformers.cache_utils import Cache

from headinfer.errors import OptionError
from headinfer.evaluate.answers.answering import Answerer
from headinfer.evaluate.answers.record import Answer
from headinfer.evaluate.harness.cached import CachedLM


class AnsweringLM(CachedLM):
    """A language model of the harness around an `Answerer`.

    Answers are greedy, one at a time. A prompt beyond what the method holds is cut in its middle,
    not at its beginning.

    Args:
        answerer: answers under its method.
    """

    def __init__(self, answerer: Answerer) -> None:
        super().__init__(answerer.model, answerer.tokenizer)
        self._answerer = answerer

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache of the method."""
        return self._answerer.new_cache(max_tokens)

    def prefill(self, tokens: Sequence[int], cache: Cache) -> torch.Tensor:
        """Pass tokens through the model by the method's way."""
        return self._answerer.prefill(tokens, cache)

    def answer(self, prompt: str, gen_kwargs: Mapping[str, Any]) -> Answer:
        """Answer a prompt as a task of the harness wants it.

        Args:
            prompt: with the chat template, if there is to be one.
            gen_kwargs: of the task.

        Raises:
            OptionError: the task wants tokens drawn at random.
        """
        keywords = normalize_gen_kwargs(dict(gen_kwargs), self.max_gen_toks)
        if keywords["do_sample"]:
            raise OptionError("answers are greedy, and the task asks for do_sample=True")
        return self._answerer.answer(
            self.tok_encode(prompt), keywords["max_gen_toks"], tuple(keywords["until"])
        )

    def _generate(self, prompts: Sequence[str], gen_kwargs: Mapping[str, Any]) -> list[str]:
        return [self.answer(prompt, gen_kwargs).text for prompt in prompts]
