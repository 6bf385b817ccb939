"""The glossary: few words, each a class that exists, and each class that packages share."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "headinfer"
CORE = ("schedule", "kv", "engine", "attend")
MOST_WORDS = 20
ENTRY = re.compile(r"\*\*([\w ]+)\*\*(?: \(((?:`\w+`(?:, )?)+)\))?: (.+)")
ONE_WORD = re.compile(r"[A-Z][a-z]+|KV")


def entries() -> dict[str, tuple[list[str], str]]:
    """Return the classes and the sentence of each word."""
    _, *lines = (ROOT / "docs" / "glossary.md").read_text().split("\n- ")
    found: dict[str, tuple[list[str], str]] = {}
    for line in lines:
        match = ENTRY.fullmatch(line.strip())
        assert match is not None, f"not an entry: {line}"
        word, classes, sentence = match.groups()
        assert word not in found
        found[word] = re.findall(r"\w+", classes or ""), sentence
    return found


def classes_of(package: str = ".") -> set[str]:
    trees = (ast.parse(path.read_text()) for path in (SOURCE / package).rglob("*.py"))
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def imports() -> Iterator[tuple[str, str, str]]:
    """Yield which package or module of ours imports a name, from which, and the name."""
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("headinfer."):
                source = str(node.module).split(".")[1]
                for name in node.names:
                    yield path.relative_to(SOURCE).parts[0], source, name.name


def test_the_glossary_is_short_and_an_entry_is_a_sentence() -> None:
    found = entries()
    assert 10 < len(found) <= MOST_WORDS
    for word, (_, sentence) in found.items():
        assert re.fullmatch(r"[A-Z][^.]*\.", sentence), f"{word}: {sentence}"


def test_the_classes_of_the_glossary_exist() -> None:
    classes = classes_of()
    for word, (named, sentence) in entries().items():
        assert set(named) <= classes, f"{word}: {named}"
        in_text = set(re.findall(r"`(\w+)`", sentence))
        assert in_text <= classes, f"{word}: {in_text}"


def test_what_packages_of_the_core_share_is_in_the_glossary() -> None:
    """A class of one word that another package imports is a word that readers meet."""
    classes = {package: classes_of(package) for package in CORE}
    shared = {
        name
        for importer, source, name in imports()
        if source in CORE and importer != source
        if ONE_WORD.fullmatch(name) and name in classes[source]
    }
    named = {name for classes, _ in entries().values() for name in classes}
    assert len(shared) > 20
    assert shared <= named, f"not in the glossary: {sorted(shared - named)}"
