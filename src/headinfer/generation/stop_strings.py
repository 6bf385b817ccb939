"""Texts that end an answer, found in the text itself.

transformers looks for them in a table of its vocabulary, which not all tokenizers fit into.
"""

from collections.abc import Sequence
from typing import Any

import torch

_TOKENS_A_CHARACTER = 4
"""The most, where a tokenizer has bytes for what it has no tokens for."""

_MORE_TOKENS = 16


class StopStrings:
    """A stopping criterion of `generate`: whether a row's new text holds one of several texts.

    Args:
        strings: the texts, of which none is empty. They may be special tokens.
        tokenizer: the model's.
        prompt_tokens: of every row, which are no new text.

    Attributes:
        found: whether a row held one when it was looked at last.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any, prompt_tokens: int) -> None:
        self.found = False
        self._strings = tuple(strings)
        self._tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens
        longest = max(map(len, self._strings), default=0)
        self._last_tokens = _TOKENS_A_CHARACTER * longest + _MORE_TOKENS

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_keywords: Any) -> torch.Tensor:
        """Return which rows are to stop, `[rows]` of bool."""
        start = max(self._prompt_tokens, input_ids.shape[1] - self._last_tokens)
        texts = self._tokenizer.batch_decode(
            input_ids[:, start:].tolist(),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        stopped = [any(string in text for string in self._strings) for text in texts]
        self.found = any(stopped)
        return torch.tensor(stopped, dtype=torch.bool, device=input_ids.device)
