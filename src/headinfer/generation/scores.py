"""What a model thought of the tokens of an answer: their log-probabilities, and the likeliest."""

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headinfer.integration.watchers import Watcher


@dataclass(frozen=True, slots=True)
class Score:
    """A score of one token of an answer.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability by the model's own logits, before any setting
            or processor changes them.
        top: ids and log-probabilities of the likeliest tokens, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenScores(Watcher):
    """A collector of scores, for an answer of one row.

    It listens to the model's calls where each gives one token. Where some verify drafts, it is told
    of the tokens' logits instead.

    Args:
        top: how many of the likeliest tokens to name.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._coming: collections.deque[torch.Tensor] = collections.deque()
        self._taken: list[Score] = []

    def end(self, output: Any) -> None:
        """Take note of the logits of a call's last token."""
        self.note(output.logits[0, -1])

    def note(self, logits: torch.Tensor) -> None:
        """Take note of the logits `[vocab]` of the token that comes next."""
        self._coming.append(logits.detach().float().log_softmax(-1))

    def take(self, ids: Sequence[int]) -> None:
        """Note which tokens were taken."""
        for token_id in ids:
            logprobs = self._coming.popleft()
            best = logprobs.topk(min(self._top, len(logprobs)))
            top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            self._taken.append(Score(token_id, float(logprobs[token_id]), tuple(top)))

    def drain(self) -> list[Score]:
        """Return the scores of the tokens that were taken since it was asked last."""
        taken, self._taken = self._taken, []
        return taken
