"""Examples of a benchmark: from files that the user has, or from the hub."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from headinfer.errors import OptionError

MADE = "made"
"""The `--data` of examples that are made up here."""

Example = dict[str, Any]
"""One example, as the benchmark's own file has it."""


def read_examples(path: Path, needed: Iterable[str]) -> list[Example]:
    """Return the examples of a file.

    Args:
        path: a JSON list of objects, one object a line, or the hub's Parquet.
        needed: fields that each example must have.

    Raises:
        OptionError: it cannot be read, or holds something else.
    """
    if path.suffix == ".parquet":
        examples = _from_library("parquet", data_files=str(path), split="train")
    else:
        examples = _from_text(path)
    if not examples:
        raise OptionError(f"--data {str(path)!r} holds no examples")
    for number, example in enumerate(examples):
        missing = [name for name in needed if not isinstance(example, dict) or name not in example]
        if missing:
            raise OptionError(
                f"--data {str(path)!r}: example {number} has no {', '.join(missing)}; is it a file "
                "of this benchmark?"
            )
    return examples


def _from_text(path: Path) -> list[Example]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise OptionError(f"--data {str(path)!r} cannot be read: {reason}") from error
    try:
        if text.lstrip().startswith("["):
            return list(json.loads(text))
        # Not splitlines(), which also splits at characters that JSON leaves within a string.
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise OptionError(
            f"--data {str(path)!r} is neither a JSON list nor one JSON object a line: {error}"
        ) from error


def hub_examples(dataset: str, *names: str, split: str, remedy: str) -> list[Example]:
    """Return the examples of a dataset on the hub.

    Args:
        dataset: its id.
        names: of its configuration, if it has several.
        split: of the dataset.
        remedy: what to do where the hub cannot be reached.

    Raises:
        OptionError: the library is not installed, or the hub cannot be reached.
    """
    try:
        return _from_library(dataset, *names, split=split)
    except OptionError as error:
        raise OptionError(f"{error}; {remedy}") from error


def _from_library(*names: str, **settings: Any) -> list[Example]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise OptionError("the library for data of the hub is missing: pip install datasets") from (
            error
        )
    try:
        return [dict(example) for example in load_dataset(*names, **settings)]
    except Exception as error:  # of many kinds, by many libraries
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise OptionError(f"{' '.join(names)} cannot be loaded: {reason}") from error


def chosen(examples: int, samples: int, seed: int) -> list[int]:
    """Return the numbers of the examples to use, in order; more samples keep those of fewer.

    Args:
        examples: how many there are.
        samples: the most to use.
        seed: of the draw.
    """
    numbers = list(range(examples))
    random.Random(f"{seed}/examples").shuffle(numbers)
    return sorted(numbers[:samples])
