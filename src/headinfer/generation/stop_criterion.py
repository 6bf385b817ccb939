"""Where rows of a model's `generate` end: once a stop is in a row's new text."""

from typing import Any

import torch

from headinfer.generation.stops import Stops
from headinfer.generation.text import TextCollector


class StopCriterion:
    """A stopping criterion for `generate`: each row whose new text has a stop in it ends.

    It reads the tokens by itself. transformers asks it before or after it hands a token to a
    streamer, by its version and the way of generating.

    Args:
        tokenizer: of transformers.
        stops: what ends a row.
        prompt_tokens: of each row.

    Attributes:
        found: whether a row had one when it was asked last.
    """

    def __init__(self, tokenizer: Any, stops: Stops, prompt_tokens: int) -> None:
        self.found = False
        self._tokenizer = tokenizer
        self._stops = stops
        self._prompt_tokens = prompt_tokens
        self._only_row = self._collector()

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_keywords: Any) -> torch.Tensor:
        """Return which rows end, `[rows]` of bool, by ids `[rows, tokens]`."""
        new = input_ids[:, self._prompt_tokens :].tolist()
        if len(new) == 1:  # it grows, and need not be read anew
            collectors = [self._only_row]
            self._only_row.add(new[0][len(self._only_row.ids) :])
        else:
            collectors = [self._collector() for _ in new]
            for collector, ids in zip(collectors, new, strict=True):
                collector.add(ids)
        stopped = [collector.stopped for collector in collectors]
        self.found = any(stopped)
        return torch.tensor(stopped, dtype=torch.bool, device=input_ids.device)

    def _collector(self) -> TextCollector:
        return TextCollector(self._tokenizer, lambda _piece: None, stops=self._stops)
