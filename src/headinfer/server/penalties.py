"""OpenAI's penalties for tokens that an answer has already."""

import torch


class Penalties:
    """A processor that lowers the scores of tokens that the answer has, of one row.

    Args:
        presence: taken off a token that is there.
        frequency: taken off once for each time that it is.
    """

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence = presence
        self._frequency = frequency
        self._prompt_tokens: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores less the penalties."""
        if self._prompt_tokens is None:
            self._prompt_tokens = input_ids.shape[1]
        times = torch.bincount(input_ids[0, self._prompt_tokens :], minlength=scores.shape[-1]).to(
            scores
        )
        taken = self._frequency * times + self._presence * (times > 0)
        return scores - taken
