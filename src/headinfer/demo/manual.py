"""A real document for real models: chapters of Python's manual, which every Python brings.

Some sentences are hidden in it that are in no manual. So their answers can only come from the
document, and not from what a model knows by heart. Pure Python.
"""

from collections.abc import Callable
from dataclasses import dataclass

CHAPTERS = ("execmodel", "debugger", "import", "try", "with", "assignment", "calls", "function")
"""Topics of `pydoc_data.topics`, in this order; as many paragraphs as fit are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """A sentence that is hidden in the document.

    Attributes:
        sentence: which is in no manual.
        question: that it answers.
        answer: the words that a right answer has.
    """

    sentence: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manual:
    """A document with sentences hidden in it.

    Attributes:
        text: paragraphs, separated by blank lines.
        hidden: the sentences, in the order in which they stand.
        depths: where each stands, as a fraction of the characters, from 0 to 1.
        num_tokens: tokens of `text`.
    """

    text: str
    hidden: tuple[Hidden, ...]
    depths: tuple[float, ...]
    num_tokens: int

    def message(self, question: str) -> str:
        """Return the user's message that asks this question about the document."""
        return f"{self.text}\n\n{question}"


HIDDEN = (
    Hidden(
        sentence="The goat of the harbour master eats nothing but velvet.",
        question="What does the goat of the harbour master eat?",
        answer="velvet",
    ),
    Hidden(
        sentence="The chairman's parrot eats nothing but roasted chestnuts.",
        question="What does the chairman's parrot eat?",
        answer="roasted chestnuts",
    ),
    Hidden(
        sentence="The mayor's uncle collects nothing but broken clocks.",
        question="What does the mayor's uncle collect?",
        answer="broken clocks",
    ),
    Hidden(
        sentence="The museum of spoons is open on Thursdays.",
        question="When is the museum of spoons open?",
        answer="Thursdays",
    ),
    Hidden(
        sentence="The lighthouse keeper's cat is afraid of nothing but violins.",
        question="What is the lighthouse keeper's cat afraid of?",
        answer="violins",
    ),
    Hidden(
        sentence="The baker's daughter plays the trombone.",
        question="What does the baker's daughter play?",
        answer="trombone",
    ),
    Hidden(
        sentence="The secret ingredient of the office soup is smoked paprika.",
        question="What is the secret ingredient of the office soup?",
        answer="paprika",
    ),
    Hidden(
        sentence="The winning lottery ticket is hidden in a teapot.",
        question="Where is the winning lottery ticket hidden?",
        answer="teapot",
    ),
)


def make_manual(num_tokens: int, count_tokens: Callable[[str], int]) -> Manual:
    """Write the document.

    Args:
        num_tokens: the most tokens of the text.
        count_tokens: counts the tokens of a text.

    Raises:
        ValueError: the hidden sentences alone have more tokens.
    """
    left = num_tokens - sum(count_tokens(f"{hidden.sentence}\n\n") for hidden in HIDDEN)
    if left <= 0:
        raise ValueError(f"the document needs more room for {len(HIDDEN)} hidden sentences")
    kept: list[str] = []
    for paragraph in _paragraphs():
        left -= count_tokens(f"{paragraph}\n\n")
        if left < 0:
            break
        kept.append(paragraph)
    text = "\n\n".join(_scattered(kept, [hidden.sentence for hidden in HIDDEN]))
    return Manual(
        text=text,
        hidden=HIDDEN,
        depths=tuple(text.index(hidden.sentence) / len(text) for hidden in HIDDEN),
        num_tokens=count_tokens(text),
    )


def _paragraphs() -> list[str]:
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[chapter] for chapter in CHAPTERS if chapter in topics)
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def _scattered(paragraphs: list[str], hidden: list[str]) -> list[str]:
    """Return the paragraphs with sentences between them, at even distances."""
    parts: list[str] = []
    start = 0
    for idx, sentence in enumerate(hidden):
        end = (2 * idx + 1) * len(paragraphs) // (2 * len(hidden))
        parts += [*paragraphs[start:end], sentence]
        start = end
    return parts + paragraphs[start:]
