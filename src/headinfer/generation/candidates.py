"""Where drafted tokens come from: the prompt itself, a smaller model, or the model itself."""

from typing import Any, Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from headinfer.errors import OptionError
from headinfer.generation.acceptance import Choice, accepted_tokens
from headinfer.integration.attachment import owner_of
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.calls import last_logits
from headinfer.plan.assistant import READ_TOKENS
from headinfer.session import Session
from headinfer.units import counted

_SAME_SCORES = 1024
"""Scores by which two models with one tokenizer may differ: their vocabularies are padded."""


class Drafter(Protocol):
    """A source of drafts for one answer of one row."""

    def begin(self, ids: torch.Tensor) -> bool:
        """Hear of the prompt, `[1, tokens]`, before the first draft; return whether it was read."""

    def draft(self, ids: torch.Tensor, most: int, choice: Choice) -> list[int]:
        """Return up to `most` tokens that may follow.

        Args:
            ids: prompt and answer so far, `[1, tokens]`.
            most: at least 1.
            choice: how the answer's tokens will be chosen.
        """


class Lookup:
    """A drafter that looks for the newest tokens in the text, and drafts what followed there.

    Args:
        ngram_tokens: the most tokens to look for.
    """

    def __init__(self, ngram_tokens: int) -> None:
        self._ngram_tokens = ngram_tokens

    def begin(self, ids: torch.Tensor) -> bool:
        """Do nothing: the text itself is looked at."""
        return False

    def draft(self, ids: torch.Tensor, most: int, choice: Choice) -> list[int]:
        """Return what followed where most of the newest tokens stood last.

        transformers' lookup takes the place where they stood first. The newest one is more often
        right: a text goes on with what it is about.
        """
        text = ids[0]
        ends = _places(text[:-1], text[-1])
        for back in range(1, min(self._ngram_tokens, len(text))):
            longer = ends[ends >= back]
            longer = longer[text[longer - back] == text[-1 - back]]
            if not len(longer):
                break
            ends = longer
        if not len(ends):
            return []
        followed: list[int] = text[int(ends[-1]) + 1 :][:most].tolist()
        while len(followed) < most:  # the text repeats itself from there on
            followed += followed[: most - len(followed)]
        return followed


def _places(text: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """Return where a token stands in a text, the newest place last."""
    return (text == token).nonzero()[:, 0]


class Itself:
    """A drafter that is the answering model, attending a part of its cache that lies at hand.

    Args:
        model: attached.
        cache: of the answer.
    """

    def __init__(self, model: PreTrainedModel, cache: OffloadedCache) -> None:
        self._model = model
        self._cache = cache

    def begin(self, ids: torch.Tensor) -> bool:
        """Do nothing: the cache holds the prompt."""
        return False

    def draft(self, ids: torch.Tensor, most: int, choice: Choice) -> list[int]:
        """Return the tokens that the model would go on with by what is at hand."""
        if self._cache.can_draft is not None:
            return []
        seen = ids
        with self._cache.drafting():
            for _ in range(most):
                newest = seen[:, -1:].to(self._model.device)
                token = choice.token(seen, last_logits(self._model, newest, self._cache)[None])
                seen = torch.cat((seen, token[None]), dim=1)
        drafted: list[int] = seen[0, ids.shape[1] :].tolist()
        return drafted


class Assistant:
    """A drafter that is a smaller model with the same tokenizer, and a cache of its own.

    Args:
        model: in eval mode; attached models draft with a cache of their attachment.
        vocabulary: scores that the answering model gives.

    Raises:
        OptionError: the model's tokens are not those of the answering model, or it cannot take
            tokens back.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: int) -> None:
        own = model.config.get_text_config(decoder=True).vocab_size
        if abs(own - vocabulary) > _SAME_SCORES:
            raise OptionError(
                f"the assistant knows {counted(own, 'token')} and the model {vocabulary:,}: they "
                "have not the same tokenizer; give an assistant of the model's own family"
            )
        self._model = model
        self._vocabulary = vocabulary
        owner = owner_of(model)
        self._cache: Any = (
            owner.new_cache() if isinstance(owner, Session) else DynamicCache(config=model.config)
        )
        if any(hasattr(layer, "recurrent_states") for layer in self._cache.layers):
            raise OptionError(
                "the assistant has recurrent states, which cannot be taken back; give one with "
                "attention alone"
            )
        if not isinstance(self._cache, OffloadedCache):
            self._cache.activate_past_recording()
        self._read = 0  # tokens of the answer's that were there before the last draft
        self._drafted: list[int] = []

    def begin(self, ids: torch.Tensor) -> bool:
        """Read the prompt, and wait until that is done: it is timed."""
        for part in ids[:, :-1].split(READ_TOKENS, dim=1):
            if part.shape[1]:
                last_logits(self._model, part.to(self._model.device), self._cache).cpu()
        self._read, self._drafted = ids.shape[1], []
        return True

    def draft(self, ids: torch.Tensor, most: int, choice: Choice) -> list[int]:
        """Return the tokens that the model would go on with."""
        self._forget(ids)
        held = self._cache.get_seq_length()
        seen, new = ids, ids[:, held:]
        for _ in range(most):
            logits = last_logits(self._model, new.to(self._model.device), self._cache)
            new = choice.token(seen, self._scores(logits))[None]
            seen = torch.cat((seen, new), dim=1)
        self._read, self._drafted = ids.shape[1], seen[0, ids.shape[1] :].tolist()
        return self._drafted

    def _forget(self, ids: torch.Tensor) -> None:
        """Take back what was drafted and not accepted."""
        right = accepted_tokens(self._drafted, ids[0, self._read :].tolist())
        surplus = self._cache.get_seq_length() - min(self._read + right, ids.shape[1] - 1)
        if surplus > 0:
            self._cache.crop(-surplus)

    def _scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits `[1, vocab]` for the answering model's vocabulary."""
        missing = self._vocabulary - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)[None]
