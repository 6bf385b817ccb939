"""The prose of documents: short sentences, and the subject first."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_WORDS = 25

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a document's paragraphs and lists, code counted as one word."""
    text = re.sub(r"```.*?```|<!--.*?-->", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"cannot run: .*", "cannot run.", text)  # a program's message follows, quoted
    text = re.sub(r"`[^`]+`", "X", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|#]|\d+\.) )", text):
        block = " ".join(block.split())
        if not block.startswith(("|", "#")):
            block = re.sub(r"^(?:[-*]|\d+\.) ", "", block)
            yield from re.split(r"(?<=[.!?])[*)]*\s+", block)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_sentences_are_short_and_begin_with_their_subject(path: Path) -> None:
    found = list(sentences(path.read_text()))
    assert len(found) > 3
    long = [sentence for sentence in found if len(sentence.split()) > MOST_WORDS]
    assert long == [], f"more than {MOST_WORDS} words"
    assert [sentence for sentence in found if re.match(r"\W*Of\b", sentence)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_of_anything_in_a_document_is_singular(path: Path) -> None:
    plural = r"(?<![\d.,-])1 ([A-Za-z-]+ )?(token|head|layer|row|text|step|GPU|needle)s\b"
    assert [found[0] for found in re.finditer(plural, path.read_text())] == []
