"""Texts of the embedded model: its own documents, for it knows no other language."""

import random
from typing import Any

from headinfer.demo import words
from headinfer.demo.document import MIN_TOKENS, Document, Fact, make_document
from headinfer.demo.evaluate import encode_prompts
from headinfer.errors import OptionError
from headinfer.finding.texts import Copied, Example


def is_demo(tokenizer: Any) -> bool:
    """Whether a tokenizer is the embedded model's."""
    return words.ASSISTANT in tokenizer.get_vocab() and tokenizer.bos_token == words.BOS


class DemoTexts:
    """A supply of documents, each with a question and its answer.

    Args:
        tokenizer: of the embedded model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.name = "documents of the embedded model"
        self.again: list[int] = []

    def text(self, tokens: int, seed: str) -> list[int]:
        """Return a document with one of its questions and the answer."""
        return list(self.example(tokens, seed).ids)

    def example(self, tokens: int, seed: str) -> Example:
        """Return a document with one of its questions and the answer.

        Raises:
            OptionError: the tokens are too few for a document.
        """
        if tokens < MIN_TOKENS:
            raise OptionError(
                f"a document of the embedded model has at least {MIN_TOKENS} tokens, not {tokens}"
            )
        drawn = random.Random(seed)
        document = make_document(tokens, drawn.randrange(2**32))
        number = drawn.randrange(len(document.facts))
        prompt = encode_prompts(self._tokenizer, document)[number]
        fact = document.facts[number]
        answer = self._tokens(f" {fact.answer}")
        copied = [
            Copied(at=len(prompt) + answer.index(token), sources=sources)
            for token, sources in self._sources(prompt, document, fact).items()
        ]
        return Example(ids=(*prompt, *answer), copied=tuple(copied))

    def _sources(
        self, prompt: list[int], document: Document, fact: Fact
    ) -> dict[int, tuple[int, ...]]:
        """Return where the tokens of an answer that have a meaning stand in the text."""
        name = self._tokens(f" {fact.adjective} {fact.noun} opens with {fact.number}")
        keeper = self._tokens(" {} {}".format(*document.keeper))
        return {
            sought[offset]: (_find(prompt, sought) + offset,)
            for sought, offsets in ((name, (-2, -1)), (keeper, (0, 1)))
            for offset in (offset % len(sought) for offset in offsets)
        }

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _find(ids: list[int], sought: list[int]) -> int:
    """Return where tokens begin that are in a document."""
    return next(at for at in range(len(ids)) if ids[at : at + len(sought)] == sought)
