"""Strings that end an answer: its text ends before the first of them, however its pieces fall."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headinfer.errors import OptionError


def check_stop(given: object) -> tuple[str, ...]:
    """Return the strings that end an answer.

    Args:
        given: one or several, in a list, a tuple or a set; None for none.

    Raises:
        OptionError: one is empty, or no string.
    """
    if given is None:
        return ()
    strings = tuple(given) if isinstance(given, (list, tuple, set, frozenset)) else (given,)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise OptionError(f"a string to stop at must be some text, not {string!r}")
    return strings


@dataclass(frozen=True, slots=True, kw_only=True)
class Stops:
    """A set of what ends an answer and is no part of its text.

    Attributes:
        strings: none of them empty.
        special: special tokens that a user named, which no text has, with their strings.
    """

    strings: tuple[str, ...] = ()
    special: Mapping[int, str] = field(default_factory=dict)

    @property
    def ids(self) -> frozenset[int]:
        """The special tokens."""
        return frozenset(self.special)

    @classmethod
    def of(cls, strings: Sequence[str], tokenizer: Any) -> "Stops":
        """Return the stops that are meant by some strings.

        Args:
            strings: none of them empty.
            tokenizer: of transformers, whose special tokens text leaves out.
        """
        special = _special_ids(tokenizer) if strings else {}
        return cls(
            strings=tuple(string for string in strings if string not in special),
            special={special[string]: string for string in strings if string in special},
        )

    def __bool__(self) -> bool:
        return bool(self.strings or self.special)

    def find(self, text: str) -> tuple[int, str] | None:
        """Return where the string begins that is complete first, and the string, if one is.

        The longest counts where several end at one place. So the pieces that a text comes in do
        not matter.
        """
        found = [
            (start + len(string), start, string)
            for string in self.strings
            if (start := text.find(string)) >= 0
        ]
        return min(found)[1:] if found else None

    def held_chars(self, text: str) -> int:
        """Return how many characters at the end of a text may yet become one of the strings."""
        return max((_overlap(text, string) for string in self.strings), default=0)


def _special_ids(tokenizer: Any) -> dict[str, int]:
    """Return the special tokens of a tokenizer, those that have no name of their own too."""
    named = {
        token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens
    }
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return named | {token.content: token_id for token_id, token in added if token.special}


def _overlap(text: str, string: str) -> int:
    """Return the most characters that a text ends with and a longer string begins with."""
    longest = min(len(text), len(string) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)
