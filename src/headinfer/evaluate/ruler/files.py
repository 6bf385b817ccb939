"""Texts that RULER does not make up, read from the user's data folder."""

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from headinfer.errors import OptionError
from headinfer.evaluate.ruler.kinds import ESSAYS, SQUAD, Source


def read_json(folder: str, source: Source) -> Any:
    """Return what a file of the data folder holds.

    Raises:
        OptionError: it cannot be read.
    """
    path = Path(folder) / source.name
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise OptionError(f"{str(path)!r} cannot be read: {reason}") from error


def _of_another_form(folder: str, source: Source) -> OptionError:
    return OptionError(
        f"{str(Path(folder) / source.name)!r} is of another form; fetch it again ({source.fetch})"
    )


@lru_cache(maxsize=1)
def essay_sentences(folder: str) -> Callable[[int], Sequence[str]]:
    """Return what gives the sentences of the first so many words of the essays.

    Beyond their last word the essays begin again. Sentences end where nltk's `punkt_tab` says, if
    nltk has it or the data folder holds `tokenizers/punkt_tab`. Otherwise they end where Punkt,
    trained on the essays, says.

    Raises:
        OptionError: there are no essays.
    """
    values = read_json(folder, ESSAYS)
    if not isinstance(values, dict) or not isinstance(values.get("text"), str):
        raise _of_another_form(folder, ESSAYS)
    text = values["text"]
    words = re.sub(r"\s+", " ", text).split(" ")
    tokenize = _sentence_tokenizer(folder, text)

    @lru_cache(maxsize=8)
    def sentences(count: int) -> Sequence[str]:
        repeats = -(-count // len(words))
        found: Sequence[str] = tokenize(" ".join((words * repeats)[:count]).strip())
        return found

    return sentences


def _sentence_tokenizer(folder: str, text: str) -> Callable[[str], Sequence[str]]:
    import nltk

    if folder not in nltk.data.path:
        nltk.data.path.append(folder)
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        from nltk.tokenize.punkt import PunktSentenceTokenizer

        trained: Callable[[str], Sequence[str]] = PunktSentenceTokenizer(text).tokenize
        return trained
    stored: Callable[[str], Sequence[str]] = nltk.sent_tokenize
    return stored


@lru_cache(maxsize=2)
def questions(folder: str, source: Source) -> tuple[list[dict[str, Any]], list[str]]:
    """Return questions, each with the numbers of its documents, and the documents.

    Raises:
        OptionError: the file is of another form than that of SQuAD or HotpotQA.
    """
    values = read_json(folder, source)
    try:
        return _squad(values["data"]) if source is SQUAD else _hotpot(values)
    except (KeyError, TypeError, ValueError) as error:
        raise _of_another_form(folder, source) from error


def _numbered(documents: set[str]) -> tuple[list[str], dict[str, int]]:
    ordered = sorted(documents)
    return ordered, {document: number for number, document in enumerate(ordered)}


def _squad(articles: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Documents are paragraphs; those of a question's article are the first to be added."""
    documents, number = _numbered(
        {paragraph["context"] for article in articles for paragraph in article["paragraphs"]}
    )
    asked = []
    for article in articles:
        of_article = [number[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            own = number[paragraph["context"]]
            beside = [other for other in of_article if other != own]
            asked += [
                {
                    "query": each["question"],
                    "outputs": [answer["text"] for answer in each["answers"]],
                    "context": [own],
                    "more_context": beside,
                }
                for each in paragraph["qas"]
                if not each["is_impossible"]
            ]
    return asked, documents


def _hotpot(entries: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Documents are titles with their sentences."""
    written = [[f"{title}\n{''.join(part)}" for title, part in each["context"]] for each in entries]
    documents, number = _numbered({document for each in written for document in each})
    asked = [
        {
            "query": each["question"],
            "outputs": [each["answer"]],
            "context": [number[document] for document in own],
        }
        for each, own in zip(entries, written, strict=True)
    ]
    return asked, documents
