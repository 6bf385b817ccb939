"""What a model reads while its heads are looked at: texts to repeat, and questions to answer."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """A token of an answer that is copied from the text.

    Attributes:
        at: its place. The token before it predicts it.
        sources: places in the text that it can be copied from.
    """

    at: int
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A text with questions and their right answers.

    Attributes:
        ids: all tokens.
        copied: what of the answers is copied, in order.
    """

    ids: tuple[int, ...]
    copied: tuple[Copied, ...]

    def beyond(self, sink_tokens: int, recent_tokens: int) -> tuple[Copied, ...]:
        """Return what is copied from beyond the reach of a streaming head."""
        return tuple(
            token
            for token in self.copied
            if all(sink_tokens <= source < token.at - recent_tokens for source in token.sources)
        )


class Texts(Protocol):
    """A supply of texts for one model; equal arguments give equal ones.

    Attributes:
        name: where they are from.
        again: tokens that ask for a text once more.
    """

    name: str
    again: list[int]

    def text(self, tokens: int, seed: str) -> list[int]:
        """Return a text of at most so many tokens."""

    def example(self, tokens: int, seed: str) -> Example:
        """Return an example of at most so many tokens.

        Raises:
            OptionError: they are too few.
        """
