"""A real document for real models: chapters of Python's manual, which every Python brings.

Some sentences are hidden in it that are in no manual. So their answers can only come from the
document, and not from what a model knows by heart. Pure Python.
"""

from collections.abc import Callable
from dataclasses import dataclass

CHAPTERS = ("execmodel", "debugger", "import", "try", "with", "assignment", "calls", "function")
"""Topics of `pydoc_data.topics`, in this order; as many paragraphs as fit are taken."""


MIN_TOKENS = 512


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


# Those of twenty tried ones that SmolLM2-135M mostly finds at 7K tokens.
HIDDEN = (
    Hidden(
        sentence="The chairman's parrot eats nothing but roasted chestnuts.",
        question="What does the chairman's parrot eat?",
        answer="roasted chestnuts",
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
        answer="smoked paprika",
    ),
)


def make_manual(num_tokens: int, count_tokens: Callable[[str], int]) -> Manual:
    """Write the document.

    Args:
        num_tokens: the most tokens of the text.
        count_tokens: counts the tokens of a text.

    Raises:
        ValueError: they are fewer than `MIN_TOKENS`.
    """
    if num_tokens < MIN_TOKENS:
        raise ValueError(f"the document must have at least {MIN_TOKENS} tokens")
    left = num_tokens - sum(count_tokens(f"{hidden.sentence}\n\n") for hidden in HIDDEN)
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
    """Return the paragraphs with sentences between them, at nearly even distances.

    None stands in the first quarter. SmolLM2-135M missed all five that were tried there, under
    stock attention too.
    """
    parts: list[str] = []
    start = 0
    for idx, sentence in enumerate(hidden):
        end = (idx + 2) * len(paragraphs) // (len(hidden) + 2)
        while end < len(paragraphs) and not paragraphs[end - 1].endswith("."):
            end += 1  # not between a heading, or a word, and what explains it
        parts += [*paragraphs[start:end], sentence]
        start = end
    return parts + paragraphs[start:]
