"""Answers that must be JSON: only tokens that go on with it are let through, by llguidance."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from headinfer.errors import OptionError

SPACES = r"[ \n]{0,8}"
"""What may stand between the parts of JSON; without a bound some models write spaces for ever."""


class Guided:
    """A processor that lets through what a grammar takes, of one answer in one row.

    Args:
        matcher: of the grammar, at its beginning.
    """

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._seen: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores with -inf for all tokens that the grammar does not take."""
        row = input_ids[0]
        if self._seen is not None:
            for token_id in row[self._seen :].tolist():
                self._matcher.consume_token(token_id)
        self._seen = len(row)
        if self._matcher.is_error():
            raise OptionError(f"the JSON schema cannot be followed: {self._matcher.get_error()}")
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))
        banned = torch.ones(scores.shape[-1], dtype=torch.bool)
        known = min(len(allowed), len(banned))
        banned[:known] = ~allowed[:known]
        return scores.masked_fill(banned.to(scores.device), float("-inf"))


class Guide:
    """A maker of processors for one model's tokens.

    Args:
        tokenizer: of transformers.
        vocabulary: tokens that the model has scores for.
        end_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_ids = sorted(end_ids)
        self._known: LLTokenizer | None = None
        self._unknown: OptionError | None = None

    def processors(self, schema: dict[str, Any] | bool) -> Callable[[], list[Guided]]:
        """Return what makes the processors of an answer that follows a JSON schema.

        Args:
            schema: checked here.

        Raises:
            OptionError: it is none, or has what is not known.
        """
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(schema if isinstance(schema, dict) else {}),
                overrides={"whitespace_pattern": SPACES},
            )
        except ValueError as error:
            raise OptionError(f"the JSON schema is not served: {_line(error)}") from error
        return self.following(grammar)

    def following(self, grammar: str) -> Callable[[], list[Guided]]:
        """Return what makes the processors of an answer that follows a grammar.

        Args:
            grammar: of llguidance; checked here.

        Raises:
            OptionError: it has a JSON schema that is none, or that has what is not known.
        """
        known = self._tokens()
        if wrong := LLMatcher.validate_grammar(grammar, known):
            raise OptionError(f"the JSON schema is not served: {_line(wrong)}")
        return lambda: [Guided(LLMatcher(known, grammar, log_level=0))]

    def bytes_of(self, token_id: int, text: str) -> bytes:
        """Return what a token writes: of a part of a character, its bytes.

        Args:
            token_id: of the model.
            text: it alone, for tokenizers that llguidance does not know.
        """
        try:
            return bytes(self._tokens().decode_bytes([token_id]))
        except OptionError:
            return text.encode(errors="replace")

    def _tokens(self) -> LLTokenizer:
        """Return the tokenizer as llguidance has it, which takes a second the first time."""
        if self._known is None:
            if self._unknown is not None:
                raise self._unknown
            try:
                self._known = from_tokenizer(
                    self._tokenizer, n_vocab=self._vocabulary, eos_token=self._end_ids or None
                )
            except ValueError as error:
                self._unknown = OptionError(
                    f"JSON is not served with this model's tokenizer: {_line(error)}"
                )
                raise self._unknown from error
        return self._known


def _line(error: object, most: int = 300) -> str:
    """Return the beginning of what a library says, in one line."""
    return " ".join(str(error).split())[:most]
