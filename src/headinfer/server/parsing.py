"""An answer's text told apart: what is said, thought, and asked of tools.

The parsers are those of transformers' own server. A model that they do not know, or text that does
not follow its model's form, is passed on as it is.
"""

import inspect
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headinfer.generation.text import TextCollector
from headinfer.serving.events import Piece, TokenScore

_logger = logging.getLogger(__name__)

_TAIL_TOKENS = 4096
"""Tokens at the end of a prompt in which the beginning of the answer's message is looked for."""


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of what a model writes for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call of a tool.

    Attributes:
        name: of the tool.
        arguments: in JSON.
    """

    name: str
    arguments: str


Part = Said | Thought | Called


class _Spelled:
    """A text of tokens, special ones included, as it comes.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._new: list[str] = []
        self._collector = TextCollector(self, self._new.append)

    def decode(self, ids: list[int], **_keywords: Any) -> str:
        """Return the text of tokens; what the collector calls."""
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def add(self, tokens: Sequence[TokenScore]) -> str:
        """Take tokens and return the text that they complete."""
        for token in tokens:
            self._collector.add([token.token_id])
        return self._drain()

    def end(self) -> str:
        """Return the text that was held back."""
        self._collector.end()
        return self._drain()

    def _drain(self) -> str:
        text = "".join(self._new)
        self._new.clear()
        return text


class MessageParser:
    """A parser of one answer.

    Args:
        parser: of transformers, or None to take all text as said.
        spelled: a tokenizer, to parse tokens and not the text, which lacks special ones.
        one_call: whether calls of tools behind the first are left out.
    """

    def __init__(self, parser: Any = None, spelled: Any = None, *, one_call: bool = False) -> None:
        self._parser = parser
        self._one_call = one_call
        self._called = False
        self._spelled = None if spelled is None else _Spelled(spelled)
        self._text = ""
        self._told_chars = 0  # of the text, which have become parts
        self._read_chars = 0  # of the text, a call that is not complete included

    def take(self, piece: Piece) -> list[Part]:
        """Take a piece of the answer and return what it completes."""
        text = self._spelled.add(piece.tokens) if self._spelled else piece.text
        return self._wanted(self._feed(text))

    def _feed(self, text: str) -> list[Part]:
        if self._parser is None:
            return [Said(text)] if text else []
        self._text += text
        return self._parse(lambda: self._parser.feed(text))

    def end(self) -> list[Part]:
        """Return what was held back."""
        parts = self._feed(self._spelled.end()) if self._spelled else []
        if self._parser is None:
            return parts
        return self._wanted([*parts, *self._parse(lambda: self._parser.finalize()[1])])

    def _wanted(self, parts: list[Part]) -> list[Part]:
        """Return parts without the calls that are left out."""
        wanted: list[Part] = []
        for part in parts:
            is_call = isinstance(part, Called)
            if not (is_call and self._called and self._one_call):
                wanted.append(part)
            self._called = self._called or is_call
        return wanted

    def _parse(self, step: Callable[[], list[dict[str, Any]]]) -> list[Part]:
        try:
            events = step()
            parts = _parts(events)
        except Exception as error:
            # It raises whatever the mistakes of a model's text lead to. Then the text is told as
            # it is, from what was not told yet.
            _logger.debug("an answer does not follow its form: %s", type(error).__name__)
            self._parser, rest = None, self._text[self._told_chars :]
            return [Said(rest)] if rest else []
        for event in events:
            self._follow(event)
        return parts

    def _follow(self, event: Mapping[str, Any]) -> None:
        """Note how much of the text an event of transformers' parser is about."""
        if event["type"] == "region_chunk":
            text = event.get("text") or ""
            start = self._text.find(text, self._read_chars)
            self._read_chars = max(start, self._read_chars) + (len(text) if start >= 0 else 0)
            if event.get("dirty"):
                return
        if event["type"] != "region_open":
            self._told_chars = self._read_chars


def _parts(events: list[dict[str, Any]]) -> list[Part]:
    """Return events of transformers' parser as parts."""
    from transformers.cli.serving.utils import (
        ReasoningText,
        ToolCall,
        response_events_to_chunks,
    )

    found: list[Part] = []
    for chunk in response_events_to_chunks(events):
        if isinstance(chunk, ToolCall):
            found.append(Called(chunk.name, chunk.arguments))
        elif isinstance(chunk, ReasoningText):
            found.append(Thought(str(chunk)))
        else:
            found.append(Said(str(chunk)))
    return found


def needs_special(model: Any, tokenizer: Any, end_ids: Collection[int]) -> bool:
    """Whether a model's answers are told apart by special tokens, which text leaves out.

    Args:
        model: of transformers.
        tokenizer: its.
        end_ids: tokens that end an answer, and are no part of it.
    """
    try:
        from transformers.cli.serving.utils import get_response_template
    except ImportError:
        return False
    template = get_response_template(tokenizer, model)
    if not template:
        return False
    fields = json.dumps(template.get("fields", {}), ensure_ascii=False).replace("\\", "")
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return any(
        token.special and token_id not in end_ids and token.content in fields
        for token_id, token in added
    )


def parser_of(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    tools: Sequence[Mapping[str, Any]] | None,
    *,
    spelled: bool = False,
    one_call: bool = False,
) -> MessageParser:
    """Return the parser of an answer.

    Args:
        model: of transformers.
        tokenizer: its.
        ids: the prompt, which may begin the answer's message.
        tools: that the model may call.
        spelled: whether pieces have tokens, to be parsed in the place of their text.
        one_call: whether calls behind the first are left out.
    """
    try:
        from transformers.cli.serving.utils import build_response_parser
    except ImportError:  # another release than those that were tested
        return MessageParser()
    try:
        tail = list(ids[-_TAIL_TOKENS:])
        takes_tools = "tools" in inspect.signature(build_response_parser).parameters
        keywords = {"tools": tools} if takes_tools else {}
        parser = build_response_parser(tokenizer, model, tail, **keywords)
    except (KeyError, TypeError, ValueError) as error:
        _logger.warning("answers are not parsed for tool calls: %s", error)
        parser = None
    return MessageParser(parser, tokenizer if spelled else None, one_call=one_call)
