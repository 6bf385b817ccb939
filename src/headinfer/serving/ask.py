"""What a client asks of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headinfer.errors import OptionError
from headinfer.generation.call import Processor
from headinfer.generation.draws import check_seed
from headinfer.generation.settings import check_given
from headinfer.generation.stops import check_stop

_MOST_LOGPROBS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A prompt with the settings of its answer.

    Attributes:
        ids: the prompt's tokens.
        given: settings of transformers' `GenerationConfig`, as `headinfer.generate` takes them.
        stop: strings that end the answer and are no part of it.
        logprobs: how many of the likeliest tokens to score beside each token; None for no scores.
        processors: makes new logits processors for this answer, such as of a JSON schema.
        seed: of what is drawn; None for a seed that nobody knows.
        marks: positions in the prompt where messages end. A model with windows or states keeps a
            snapshot there, for prompts that go on otherwise.
    """

    ids: tuple[int, ...]
    given: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    processors: Callable[[], Sequence[Processor]] | None = None
    seed: int | None = None
    marks: tuple[int, ...] = ()

    def check(self, vocabulary: int) -> None:
        """Refuse what no model answers, before any work.

        Args:
            vocabulary: tokens that the model has an embedding for.

        Raises:
            OptionError: names the setting, its value and what is allowed.
        """
        if not self.ids:
            raise OptionError("the prompt has no tokens; give at least one")
        wrong = next((each for each in self.ids if not 0 <= each < vocabulary), None)
        if wrong is not None:
            raise OptionError(
                f"the prompt has token id {wrong}, but the model knows ids from 0 to "
                f"{vocabulary - 1}; use the model's own tokenizer"
            )
        check_given(self.given)
        check_stop(self.stop)
        self._check_rows()
        check_seed(self.seed)

    def _check_rows(self) -> None:
        beams = self.given.get("num_beams")
        if beams not in (None, 1):
            raise OptionError(
                f"num_beams={beams!r} is not served: answers come token by token; leave it out"
            )
        if self.logprobs is None:
            return
        if not 0 <= self.logprobs <= _MOST_LOGPROBS:
            raise OptionError(f"logprobs must be from 0 to {_MOST_LOGPROBS}, not {self.logprobs}")
