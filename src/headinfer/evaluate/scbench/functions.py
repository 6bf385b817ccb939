"""Which function of a repository a response repeats, as RepoQA and SCBench decide it.

The rule is that of `scbench/repo_qa_utils.py` of github.com/microsoft/MInference: the most similar
function must be the one asked for, and its BLEU at least 0.8.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from headinfer.errors import OptionError

_LEAST_SIMILARITY = 0.8
_BLOCK = re.compile(r"^```(?:\w+)?\s*\n(.*?)(?=^```)```", re.DOTALL | re.MULTILINE)
FUNCTIONS = {
    "python": "function_definition",
    "java": "method_declaration",
    "typescript": "function_declaration",
    "rust": "function_item",
    "cpp": "function_definition",
    "go": "function_declaration",
}
"""What the grammar of each language of the benchmark calls a function."""
_LIBRARIES = 'pip install nltk "tree-sitter-language-pack<1"'
"""From 1 on, that package fetches its grammars when they are asked for."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function that is asked for somewhere in a repository.

    Attributes:
        name: of the function.
        text: its source.
    """

    name: str
    text: str


def names_function(response: str, name: str, functions: Sequence[Function], language: str) -> bool:
    """Whether a response repeats one function, and none of the others more closely.

    Args:
        response: of the model.
        name: of the function that was asked for.
        functions: all of its repository that are asked for.
        language: of the repository.

    Raises:
        OptionError: a library is missing.
    """
    similarity = _bleu()
    code = _function_in(response.strip(), language)
    best, best_similarity = None, 0.0
    for function in functions:
        like = similarity(code, function.text)
        if like > best_similarity:
            best, best_similarity = function.name, like
    return best == name and best_similarity >= _LEAST_SIMILARITY


def _bleu() -> Any:
    try:
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    except ImportError as error:
        raise OptionError(f"scores of code need libraries: {_LIBRARIES}") from error
    smoothing = SmoothingFunction().method4

    def similarity(given: str, right: str) -> float:
        words = [re.split(r"\s+", text.strip()) for text in (right, given)]
        return float(sentence_bleu([words[0]], words[1], smoothing_function=smoothing))

    return similarity


def _function_in(response: str, language: str) -> str:
    """Return the first function in a response's blocks of code; else the first block, else all."""
    blocks = _BLOCK.findall(response)
    for block in blocks:
        source = block.encode()
        for node in _nodes(_parsed(source, language)):
            if node.type == FUNCTIONS[language] and _is_plain(node, language):
                return bytes(source[node.start_byte : node.end_byte]).decode()
    return str(blocks[0]) if blocks else response


def _is_plain(node: Any, language: str) -> bool:
    """Whether a C++ definition is of a plain name, the only ones that the official query finds."""
    if language != "cpp":
        return True
    declarator = node.child_by_field_name("declarator")
    if declarator is None or declarator.type != "function_declarator":
        return False
    inner = declarator.child_by_field_name("declarator")
    return inner is not None and inner.type == "identifier"


def _parsed(source: bytes, language: str) -> Any:
    try:
        from tree_sitter_language_pack import get_parser
    except ImportError as error:
        raise OptionError(f"scores of code need libraries: {_LIBRARIES}") from error
    return get_parser(language).parse(source).root_node


def _nodes(node: Any) -> Iterator[Any]:
    """Yield a node and all below it, each before what is in it."""
    # Without recursion: a model may write brackets deeper than Python calls.
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += reversed(node.children)
