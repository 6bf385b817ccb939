"""The prose of docstrings, those of constants included.

Sentences are short and begin with their subject, and classes say what one is.
"""

import ast
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "headinfer"

MOST_WORDS = 25

SECTIONS = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):$", re.MULTILINE)
CODE = re.compile(r"``[^`]*``|`[^`]*`")
ENTRY_NAME = re.compile(r"^[\w*., ]+?(?: \([^)]*\))?: ")

Defined = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Assigned = ast.Assign | ast.AnnAssign


MODULES = sorted(SOURCE.rglob("*.py"))


def module_name(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").as_posix()


def paragraphs(text: str) -> Iterator[str]:
    """Stretches of prose: parted by empty lines and by the items of lists, without code."""
    for part in re.split(r"\n\s*\n|\n(?=\s*[-*] )", text):
        if not part.startswith((" ", ">>>")):
            yield re.sub(r"^[-*] ", "", part)


def entries(section: str, text: str) -> Iterator[str]:
    """What each entry of a section says, without the name it begins with."""
    if section in ("Returns", "Yields"):
        yield text
        return
    for entry in re.split(r"\n(?=    \S)", text):
        yield ENTRY_NAME.sub("", entry.strip())


def sentences(docstring: str) -> Iterator[str]:
    """Each sentence of the description and of the entries, code being one word."""
    description, *rest = SECTIONS.split(CODE.sub("CODE", docstring))
    texts = list(paragraphs(description))
    for section, text in zip(rest[::2], rest[1::2], strict=True):
        texts += entries(section, text)
    for text in texts:
        yield from re.split(r"(?<=[.!?])\s+", " ".join(text.split()))


def documented(path: Path) -> Iterator[tuple[Defined | Assigned, str]]:
    """What is documented in a module, itself included: a constant by the string behind it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, Defined):
            continue
        if docstring := ast.get_docstring(node):
            yield node, docstring
        for before, after in itertools.pairwise(node.body):
            match before, after:
                case ast.Assign() | ast.AnnAssign(), ast.Expr(ast.Constant(str(docstring))):
                    yield before, inspect.cleandoc(docstring)


def place(path: Path, node: Defined | Assigned) -> str:
    return f"{module_name(path)}, line {getattr(node, 'lineno', 1)}"


def is_kind(node: ast.ClassDef) -> bool:
    """Whether a class is an error or an enumeration, named by its cases and not by one of them."""
    bases = [ast.unparse(base) for base in node.bases]
    return any(base.endswith(("Error", "Exception", "Warning", "Enum")) for base in bases)


def test_sentences_are_told_apart() -> None:
    docstring = """A thing of `two words`.

    It has two facts. Of these,
    one is here:

    - an item of a list

    Args:
        given (int): what is given. It is
            kept.
        other: what is not.

    Returns:
        What comes:
        nothing.
    """
    cleaned = ast.get_docstring(ast.parse(f'"""{docstring}"""'))
    assert cleaned is not None
    assert [sentence for sentence in sentences(cleaned) if sentence] == [
        "A thing of CODE.",
        "It has two facts.",
        "Of these, one is here:",
        "an item of a list",
        "what is given.",
        "It is kept.",
        "what is not.",
        "What comes: nothing.",
    ]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_sentences_are_short_and_begin_with_their_subject(path: Path) -> None:
    for node, docstring in documented(path):
        for sentence in sentences(docstring):
            words = len(sentence.split())
            assert words <= MOST_WORDS, f"{place(path, node)}: {words} words: {sentence}"
            assert not sentence.startswith("Of "), f"{place(path, node)}: {sentence}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_classes_say_what_one_is(path: Path) -> None:
    for node, docstring in documented(path):
        if isinstance(node, ast.ClassDef) and not is_kind(node):
            assert docstring.startswith(("A ", "An ")), f"{place(path, node)}: {docstring}"
