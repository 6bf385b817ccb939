"""What a user says of drafts: how many, and by whom. And whether an answer has any."""

import logging
from dataclasses import dataclass

from transformers import PreTrainedModel

from headinfer.errors import OptionError
from headinfer.generation.candidates import Assistant, Drafter, Lookup
from headinfer.generation.pace import MOST_DRAFTED, FixedPace, MeasuredPace, Number, Pace
from headinfer.generation.settings import Settings
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.layer import OffloadedLayer
from headinfer.integration.said import SaidOnce
from headinfer.ranks.group import Ranks

_logger = logging.getLogger(__name__)
_said = SaidOnce(_logger)

_AUTO_MOST = 16
"""Drafts of one verification at the most, where nobody says how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """A user's word on drafts.

    Attributes:
        number: to draft at a time; "auto" for what makes a token cheapest, which may be none.
        assistant: a smaller model that drafts; None for none.
    """

    number: Number = "auto"
    assistant: PreTrainedModel | None = None

    def begin(
        self, model: PreTrainedModel, settings: Settings, cache: OffloadedCache, ranks: Ranks
    ) -> tuple[Drafter, Pace] | None:
        """Return who drafts for one answer, and at which pace; None where nobody does.

        Args:
            model: that answers.
            settings: of the answer.
            cache: its.
            ranks: processes that compute the model.

        Raises:
            OptionError: the settings do not go together.
        """
        lookup = settings.lookup_tokens
        if self.number == "off" or (lookup is None and self.assistant is None):
            return None
        if lookup is not None and self.assistant is not None:
            raise OptionError(
                "an assistant and prompt_lookup_num_tokens both draft; leave one of them out"
            )
        if (obstacle := _obstacle(settings, cache)) is not None:
            _said.say(logging.WARNING, obstacle, "nothing is drafted: %s", obstacle)
            return None
        drafter: Drafter
        if self.assistant is None:
            assert lookup is not None
            most, tried, drafter = lookup, lookup, Lookup(settings.lookup_ngram_tokens)
        else:
            vocabulary = model.config.get_text_config(decoder=True).vocab_size
            most, tried, drafter = _AUTO_MOST, 1, Assistant(self.assistant, vocabulary)
        if self.number != "auto":
            return drafter, FixedPace(self.number)
        if ranks.size > 1:  # each would go by its own clock
            return (drafter, FixedPace(lookup)) if lookup is not None else None
        return drafter, MeasuredPace(min(most, MOST_DRAFTED), tried)


def _obstacle(settings: Settings, cache: OffloadedCache) -> str | None:
    """Return why an answer cannot have drafts; None where it can."""
    if settings.rows > 1:
        return "drafts are for one row, and this answer has several"
    if not all(isinstance(layer, OffloadedLayer) for layer in cache.layers):
        return "the model has recurrent states, which cannot be taken back"
    return None
