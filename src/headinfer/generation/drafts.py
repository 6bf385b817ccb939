"""What a user says of drafts: how many, and by whom. And whether an answer has any."""

import logging
import weakref
from dataclasses import dataclass

from transformers import DynamicCache, PreTrainedModel

from headinfer.generation.candidates import Assistant, Drafter, Itself, Lookup
from headinfer.generation.kept_paces import paces_of
from headinfer.generation.pace import MOST_DRAFTED, FixedPace, Number, Pace
from headinfer.generation.settings import Settings
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.rotary import rotary_modules_by_length
from headinfer.integration.said import SaidOnce
from headinfer.integration.support import layer_kind
from headinfer.plan.shape import LayerKind
from headinfer.schedule.route import MAX_ASKED_TOKENS
from headinfer.session import Session

_logger = logging.getLogger(__name__)
_said = SaidOnce(_logger)

_AUTO_MOST = MAX_ASKED_TOKENS - 1
"""Drafts of one verification at the most, where nobody says how many.

The CPU takes no part in longer passes, and they are not captured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafts:
    """A user's word on drafts.

    Attributes:
        number: to draft at a time; "auto" for what makes a token cheapest, which may be none. None
            is "auto" where somebody can draft.
        assistant: a smaller model that drafts; None for none.
    """

    number: Number | None = None
    assistant: PreTrainedModel | None = None

    def begin(
        self,
        model: PreTrainedModel,
        settings: Settings,
        cache: OffloadedCache,
        session: Session,
        tokens: int,
    ) -> tuple[Drafter, Pace] | None:
        """Return who drafts for one answer, and at which pace; None where nobody does.

        Args:
            model: that answers.
            settings: of the answer.
            cache: its.
            session: the attachment.
            tokens: of the prompt.

        Raises:
            OptionError: the assistant cannot draft for the model.
        """
        if self.number == "off":
            return None
        lookup = None if self.assistant is not None else settings.lookup_tokens
        found = self._drafter(model, settings, cache, session)
        if found is None and self.number is None:
            return None
        obstacle = _obstacle(model, settings)
        if found is None and obstacle is None:
            obstacle = "no tokens are set aside for it (draft_tokens), and nobody else drafts"
        if found is None or obstacle is not None:
            _say(str(obstacle))
            return None
        drafter, most, tried = found
        if isinstance(self.number, int):
            return drafter, FixedPace(min(self.number, lookup or MOST_DRAFTED))
        if session.ranks.size == 1:
            who = type(drafter) if self.assistant is None else weakref.ref(self.assistant)
            pace = paces_of(session).begin(who, min(most, MOST_DRAFTED), tried, tokens)
            return drafter, pace
        if lookup is not None:
            return drafter, FixedPace(lookup)
        _say("each of several ranks would go by its own clock; give a number to draft")
        return None

    def assistant_tokens(self, model: PreTrainedModel, settings: Settings, tokens: int) -> int:
        """Return how many of an answer's tokens the assistant holds: none where it cannot draft.

        Args:
            model: that answers.
            settings: of the answer.
            tokens: of prompt and answer.
        """
        return tokens if _obstacle(model, settings) is None else 0

    def _drafter(
        self, model: PreTrainedModel, settings: Settings, cache: OffloadedCache, session: Session
    ) -> tuple[Drafter, int, int] | None:
        """Return who drafts, how many at the most and how many in a trial; None for nobody."""
        lookup = settings.lookup_tokens
        if self.assistant is not None:  # also where the model's own settings have a lookup
            vocabulary = model.config.get_text_config(decoder=True).vocab_size
            return Assistant(self.assistant, vocabulary), _AUTO_MOST, 1
        if lookup is not None:
            return Lookup(settings.lookup_ngram_tokens), lookup, lookup
        if session.plan.draft_tokens:
            return Itself(model, cache), _AUTO_MOST, 1
        return None


def _say(why: str) -> None:
    """Say why nothing is drafted, once."""
    _said.say(logging.WARNING, why, "nothing is drafted: %s", why)


def _obstacle(model: PreTrainedModel, settings: Settings) -> str | None:
    """Return why an answer cannot have drafts; None where it can."""
    if settings.rows > 1:
        return "drafts are for one row, and this answer has several"
    layers = DynamicCache(config=model.config).layers
    if any(layer_kind(layer) is LayerKind.STATE for layer in layers):
        return "the model has recurrent states, which cannot be taken back"
    if rotary_modules_by_length(
        model
    ):  # drafts make a pass longer, so that it is rotated otherwise
        return "the model's rotary frequencies follow the length of a pass"
    return None
