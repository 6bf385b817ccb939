"""Examples of SCBench by task: from a folder, a file or the hub; or made up."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from headinfer.errors import OptionError
from headinfer.evaluate.prompts.examples import MADE, Example, hub_examples, read_examples
from headinfer.evaluate.scbench.functions import FUNCTIONS
from headinfer.evaluate.scbench.made import MAKERS, fitted
from headinfer.evaluate.scbench.prompts import FORMS

DATASET = "microsoft/SCBench"

PAPER_TASKS = tuple(
    f"scbench_{name}"
    for name in (
        *("kv", "prefix_suffix", "vt", "qa_chn", "qa_eng"),
        *("choice_eng", "mf", "many_shot", "summary"),
    )
)
"""The tasks of the paper's Table 2."""

MADE_TASKS = tuple(MAKERS)
"""The tasks whose data can be made up."""


_OPTIONS = 4


def found_tasks(data: str) -> tuple[str, ...]:
    """Return the tasks that a folder or a file of the user's has.

    Raises:
        OptionError: none.
    """
    found = tuple(task for task in FORMS if _file(Path(data), task) is not None)
    if not found:
        raise OptionError(
            f"--data {data!r} is no file or folder of SCBench's; name them after the tasks, such "
            "as scbench_kv.jsonl"
        )
    return found


def _file(path: Path, task: str) -> Path | None:
    """Return where a task's examples are; None where they are not."""
    if not path.is_dir():
        return path if path.is_file() and path.stem == task else None
    named = [path / f"{task}{ending}" for ending in (".jsonl", ".json", ".parquet")]
    # A copy of the hub's repository has a folder for each task.
    nested = sorted((path / task).glob("*.parquet"))
    return next((each for each in (*named, *nested) if each.is_file()), None)


@lru_cache(maxsize=16)
def examples(data: str | None, task: str) -> list[Example]:
    """Return all examples of a task.

    Args:
        data: path of a folder or a file; None for the hub.
        task: name.

    Raises:
        OptionError: they cannot be had.
    """
    if data is None:
        return hub_examples(
            DATASET,
            task,
            split="test",
            remedy=f"or fetch {task} of huggingface.co/datasets/{DATASET} as {task}.jsonl and name "
            f"its folder with --data, or try --data {MADE}",
        )
    file = _file(Path(data), task)
    if file is None:
        raise OptionError(f"--data {data!r} has no {task}.jsonl")
    found = read_examples(file, ("multi_turns",))
    for number, example in enumerate(found):
        if lack := _lack(task, example):
            raise OptionError(
                f"--data {str(file)!r}: example {number}{lack}; is it a file of this task?"
            )
    return found


def _lack(task: str, example: Example) -> str | None:
    """Return what an example lacks of what its task needs; None where it is whole."""
    turns = example["multi_turns"]
    if not turns or any("input" not in turn or "answer" not in turn for turn in turns):
        return " has a turn without input and answer"
    if "context" not in example and "input" not in example:
        return " has no context or input"
    lacks = (_turn_lack(task, turn) for turn in turns)
    if lack := next((f", turn {each}{lack}" for each, lack in enumerate(lacks) if lack), None):
        return lack
    if "repoqa" not in task:
        return None
    if missing := [name for name in ("repo", "lang") if name not in example]:
        return f" has no {' and no '.join(missing)}"
    if example["lang"] not in FUNCTIONS:
        return f" has lang {example['lang']!r}, not one of {', '.join(FUNCTIONS)}"
    return None


def _turn_lack(task: str, turn: Example) -> str | None:
    kinds = FORMS[task].new_tokens
    kind = task
    if not isinstance(kinds, int):
        if "task" not in turn:
            return " has no task"
        kind = turn["task"]
        if kind not in kinds:
            return f" is of task {kind!r}, not of {' or '.join(kinds)}"
    if kind == "scbench_repoqa" and "name" not in turn:
        return " has no name"
    if kind == "scbench_choice_eng":
        options = turn.get("options")
        if options is None:
            return " has no options"
        if len(options) != _OPTIONS or turn["answer"] not in options:
            return " has no four options with the answer among them"
    return None


def made_examples(
    task: str, samples: int, seed: int, context_tokens: int, tokenizer: Any, *, raw: bool
) -> Iterator[tuple[int, Example]]:
    """Yield made-up examples of a task with their numbers; see `made.fitted`."""
    for number in range(samples):
        drawn = f"{seed}/{context_tokens}/{task}/{number}"
        yield number, fitted(task, drawn, context_tokens, tokenizer, raw=raw)
