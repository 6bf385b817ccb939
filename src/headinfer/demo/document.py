"""Documents for the demo model: facts hidden in a chronicle, among distractors of their form.

Pure Python; a document depends on its arguments alone.
"""

import random
from dataclasses import dataclass

from headinfer.demo import prose, words
from headinfer.demo.tokenizer import count_tokens

PROMPT_TOKENS = 32
"""Tokens kept free for the chat template, the question and the blank line before it."""

MIN_TOKENS = 512
TOKENS_PER_DISTRACTOR = 200
MAX_DISTRACTORS = 2000
"""A longer document has no more of them, as strongbox names run out."""

_RELATED_SHARE = 0.8
"""Share of the distractors that share a word with a fact, while such names last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A fact of a document, with its question.

    Attributes:
        adjective: First word of the strongbox's name.
        noun: Second word of the strongbox's name.
        number: What the question asks for, such as `73-91`.
        depth: Where the fact stands, as a fraction of the document's tokens, from 0 to 1.
        question: The question in plain language.
        cloze: The beginning of a sentence that the answer completes.
        answer: The right answer, the same for question and cloze.
    """

    adjective: str
    noun: str
    number: str
    depth: float
    question: str
    cloze: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text with facts hidden in it.

    Attributes:
        text: The text, paragraphs separated by blank lines.
        facts: The hidden facts, in the order in which they stand.
        distractors: Other sentences of the same form, as (adjective, noun, number), in no certain
            order.
        keeper: Forename and surname of the keeper, which every answer names.
        keeper_depth: Where the keeper is named, as a fraction of the document's tokens.
        num_tokens: Tokens of `text`.
    """

    text: str
    facts: tuple[Fact, ...]
    distractors: tuple[tuple[str, str, str], ...]
    keeper: tuple[str, str]
    keeper_depth: float
    num_tokens: int

    def message(self, question: str) -> str:
        """Return the user's message that asks this question about the document."""
        return f"{self.text}\n\n{question}"


def make_document(num_tokens: int, seed: int = 0, *, num_facts: int = 8) -> Document:
    """Write a document with facts at random depths.

    Args:
        num_tokens: Most tokens of the whole prompt: chat template, document and question. The
            document is at most `PROMPT_TOKENS` and one sentence shorter.
        seed: Equal seeds give equal documents.
        num_facts: How many facts to hide.

    Raises:
        ValueError: `num_tokens` is too small, or `num_facts` is out of range.
    """
    if not 1 <= num_facts <= 16:
        raise ValueError(f"num_facts must be from 1 to 16, but is {num_facts}")
    if num_tokens < MIN_TOKENS:
        raise ValueError(
            f"num_tokens must be at least {MIN_TOKENS}, to leave room for prose,"
            f" but is {num_tokens}"
        )
    return _Writer(num_tokens - PROMPT_TOKENS, seed, num_facts).write()


def make_prose(num_tokens: int, seed: int = 0) -> str:
    """Write at least so many tokens of the chronicle, in which no fact is stated.

    Args:
        num_tokens: Fewest tokens of the text.
        seed: Equal seeds give equal texts.
    """
    writer = _Writer(num_tokens, seed, num_facts=1)
    parts: list[str] = []
    written = 0
    while written < num_tokens:
        parts.append(writer.sentence())
        written += count_tokens(" " + parts[-1])
    return " ".join(parts)


class _Writer:
    def __init__(self, budget_tokens: int, seed: int, num_facts: int) -> None:
        self.budget_tokens = budget_tokens
        self.random = random.Random(seed)
        names = [(adjective, noun) for adjective in words.ADJECTIVES for noun in words.NOUNS]
        self.random.shuffle(names)
        self.fact_names, self.other_names = names[:num_facts], names[num_facts:]
        self.keeper = (self.random.choice(words.FORENAMES), self.random.choice(words.SURNAMES))

    def write(self) -> Document:
        num_distractors = min(self.budget_tokens // TOKENS_PER_DISTRACTOR, MAX_DISTRACTORS)
        distractor_names = self._distractor_names(num_distractors)
        numbers = self._numbers(len(self.fact_names) + num_distractors)
        named = list(zip(self.fact_names + distractor_names, numbers, strict=True))
        hidden = [self._state(name, number) for name, number in named]
        hidden.append(prose.KEEPER.format(forename=self.keeper[0], surname=self.keeper[1]))
        text, num_tokens, starts = self._assemble(hidden)
        num_facts = len(self.fact_names)
        facts = [self._fact(*named[idx], starts[idx] / num_tokens) for idx in range(num_facts)]
        return Document(
            text=text,
            facts=tuple(sorted(facts, key=lambda fact: fact.depth)),
            distractors=tuple((*name, number) for name, number in named[num_facts:]),
            keeper=self.keeper,
            keeper_depth=starts[-1] / num_tokens,
            num_tokens=num_tokens,
        )

    def sentence(self) -> str:
        """Write a sentence of prose."""
        return self._fill(self.random.choice(prose.SENTENCES))

    def _distractor_names(self, count: int) -> list[tuple[str, str]]:
        adjectives = {adjective for adjective, _ in self.fact_names}
        nouns = {noun for _, noun in self.fact_names}
        related = [name for name in self.other_names if name[0] in adjectives or name[1] in nouns]
        unrelated = [
            name for name in self.other_names if name[0] not in adjectives and name[1] not in nouns
        ]
        num_related = min(round(count * _RELATED_SHARE), len(related))
        return related[:num_related] + unrelated[: count - num_related]

    def _numbers(self, count: int) -> list[str]:
        """Draw different numbers."""
        return [
            f"{value // 100:02d}-{value % 100:02d}"
            for value in self.random.sample(range(10_000), count)
        ]

    def _state(self, name: tuple[str, str], number: str) -> str:
        return self._fill(
            self.random.choice(prose.FACTS), adjective=name[0], noun=name[1], number=number
        )

    def _fact(self, name: tuple[str, str], number: str, depth: float) -> Fact:
        adjective, noun = name
        return Fact(
            adjective=adjective,
            noun=noun,
            number=number,
            depth=depth,
            question=prose.QUESTION.format(adjective=adjective, noun=noun),
            cloze=prose.CLOZE.format(adjective=adjective, noun=noun),
            answer=prose.ANSWER.format(
                number=number, forename=self.keeper[0], surname=self.keeper[1]
            ),
        )

    def _fill(self, template: str, **given: str) -> str:
        """Fill a sentence's slots at random, and begin it with a capital letter."""
        text = template
        while "{" in text:
            start, end = text.index("{"), text.index("}")
            slot = text[start + 1 : end]
            text = text[:start] + (given.get(slot) or self._filler(slot, text)) + text[end + 1 :]
        return text[0].upper() + text[1:]

    def _filler(self, slot: str, text: str) -> str:
        """Draw what fills a slot, but nothing that the sentence has already."""
        if slot == "year":
            return str(self.random.randrange(1610, 1900))
        if slot == "count":
            return str(self.random.randrange(11, 99))
        if slot == "mention":
            adjective, noun = self.random.choice(self.fact_names + self.other_names)
            return f"the {adjective} {noun}"
        return self.random.choice(
            [filler for filler in prose.SLOTS[slot] if filler.lower() not in text.lower()]
        )

    def _assemble(self, hidden: list[str]) -> tuple[str, int, list[int]]:
        """Scatter the hidden sentences over prose.

        Returns:
            The text, its tokens, and the token index at which each hidden sentence starts.
        """
        # A sentence that starts a paragraph costs one token more than one that follows a space.
        costs = [count_tokens(" " + text) + 1 for text in hidden]
        reserved = sum(costs)
        prose_tokens = self.budget_tokens - reserved
        places = [self.random.random() * prose_tokens for _ in hidden]
        waiting = sorted(range(len(hidden)), key=places.__getitem__, reverse=True)
        starts = [0] * len(hidden)
        parts: list[str] = []
        num_tokens = written_prose = until_break = 0
        full = False
        while waiting or not full:
            due = bool(waiting) and (full or places[waiting[-1]] <= written_prose)
            sentence = hidden[waiting[-1]] if due else self.sentence()
            separator = "" if not parts else " " if until_break else "\n\n"
            cost = count_tokens(separator + sentence)
            if not due and num_tokens + cost + reserved > self.budget_tokens:
                full = True
                continue
            until_break = until_break - 1 if until_break else self.random.randrange(3, 8)
            if due:
                idx = waiting.pop()
                starts[idx] = num_tokens
                reserved -= costs[idx]
            else:
                written_prose += cost
            parts += [separator, sentence]
            num_tokens += cost
        return "".join(parts), num_tokens, starts
