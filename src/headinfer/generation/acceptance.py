"""Which token comes next, and how many of the drafted ones that makes good.

A token is chosen from what a verifying pass says, by the processors and the draw that transformers'
plain decoding would use for it. Drafted tokens are right as long as they are the ones chosen. So a
draft decides what is computed together, and never what is written. Greedy or sampled, the answer is
the one without drafts, up to the rounding of passes of several rows.

torch draws a token as the one that is first in a race: the largest probability over a random
number. A draft draws with the very numbers that its verification will draw with. So the two mostly
agree where their probabilities do, as by a rejection sampling of both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList, SynthIDTextWatermarkLogitsProcessor
from transformers.generation.logits_process import (
    PrefixConstrainedLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

_STATEFUL = (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    PrefixConstrainedLogitsProcessor,  # calls what a user wrote
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A way of choosing a token by the logits of one row.

    Attributes:
        processors: change the scores before.
        samples: whether to draw a token, instead of taking the likeliest.
        generator: of what is drawn; None for torch's own.
    """

    processors: LogitsProcessorList
    samples: bool
    generator: torch.Generator | None = None

    def token(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return the token after `ids` as `[1]`.

        Args:
            ids: `[1, tokens]`.
            logits: `[1, vocab]` of the model, of any dtype; left as they are.
        """
        scores = logits.to(copy=True, dtype=torch.float32, device=ids.device)
        scores = self.processors(ids, scores)
        token: torch.Tensor = scores.argmax(dim=-1)
        if self.samples:
            drawn = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
            token = drawn.squeeze(1)
        return token

    def ahead(self, generator: torch.Generator | None) -> "Choice":
        """Return the choice that a draft makes, of tokens that may not come to be.

        What counts the tokens it has seen is left out: processors of users, and some of
        transformers'.

        Args:
            generator: gives the numbers that this choice will draw with, and is not its own.
        """
        return Choice(
            processors=LogitsProcessorList(filter(_may_see_drafts, self.processors)),
            samples=self.samples,
            generator=generator,
        )


def _may_see_drafts(processor: Any) -> bool:
    """Whether a processor gives the same for a text, whatever it was asked before."""
    own = type(processor).__module__.startswith("transformers.")
    return own and not isinstance(processor, _STATEFUL)


def accepted_tokens(drafted: Sequence[int], chosen: Sequence[int]) -> int:
    """Return how many drafted tokens are right: those before the first that is not chosen."""
    for number, (draft, token) in enumerate(zip(drafted, chosen, strict=False)):
        if draft != token:
            return number
    return min(len(drafted), len(chosen))
