"""Prompts of SCBench, and the most tokens of its answers.

They are those of github.com/microsoft/MInference (`scbench/eval_utils.py`), with its chat template.
There each later turn of `scbench_mf` asks the last turn's question in a chat. Here it asks its own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from headinfer.evaluate.prompts import chat
from headinfer.evaluate.prompts.examples import Example

_KV = "Extract the value corresponding to the specified key in the JSON object below.\n\n{context}"
_CHOICE = "Read the book and answer the question.\n\n{context}"
_QA = "Read the book and answer the question. Be very concise in your answer.\n\n{context}"
_CHINESE = "阅读以下书籍然后回答问题。\n\n{context}"
_CODE = (
    "Based on the function description and code context, please retrieve and repeat the exact "
    "described function from the code context in a code block wrapped by ```:\n\n{context}"
)
_OPTIONS = "Question: {input}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\n\n"
_CHOSEN = _OPTIONS + "The the correct answer is"  # the official wording
_CHOSEN_RAW = _OPTIONS + "The letter of the correct answer is"
_ASKED = "Question: {input}\nAnswer:"
_ASKED_CHINESE = "问题：{input}\n答案："  # noqa: RUF001


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A form of a task's prompts.

    Attributes:
        new_tokens: the most tokens of an answer, for each kind of turn where kinds differ.
        context: what stands before the questions.
        question: what stands for each.
        later_raw: the same for a later turn without a chat template, where it differs.
        begun: how the answer to a later turn of a chat is begun.
    """

    new_tokens: int | dict[str, int]
    context: str = "{context}"
    question: str = "{input}"
    later_raw: str | None = None
    begun: str = ""


FORMS = {
    "scbench_kv": Form(new_tokens=150, context=_KV),
    "scbench_prefix_suffix": Form(new_tokens=150),
    "scbench_vt": Form(new_tokens=30),
    "scbench_repoqa": Form(new_tokens=1024, context=_CODE),
    "scbench_qa_eng": Form(new_tokens=40, context=_QA, question=_ASKED),
    "scbench_qa_chn": Form(new_tokens=40, context=_CHINESE, question=_ASKED_CHINESE),
    "scbench_choice_eng": Form(
        new_tokens=40, context=_CHOICE, question=_CHOSEN, later_raw=_CHOSEN_RAW
    ),
    "scbench_many_shot": Form(new_tokens=10),
    "scbench_summary": Form(new_tokens=200, begun="This paper"),
    "scbench_mf": Form(
        new_tokens=5, context="{target}\n\n{context}", question="{target}\n\n{input}"
    ),
    "scbench_summary_with_needles": Form(
        new_tokens={"scbench_summary": 800, "scbench_passkey": 15}
    ),
    "scbench_repoqa_and_kv": Form(new_tokens={"scbench_repoqa": 1024, "scbench_kv": 80}),
}
"""The tasks, in the order of the benchmark's own list."""


def new_tokens(task: str, turn: Example) -> int:
    """Return the most tokens of the answer to a turn."""
    most = FORMS[task].new_tokens
    return most if isinstance(most, int) else most[turn["task"]]


def most_new_tokens(task: str) -> int:
    """Return the most tokens of any answer of a task."""
    most = FORMS[task].new_tokens
    return most if isinstance(most, int) else max(most.values())


def of_turns(task: str, example: Example, tokenizer: Any, *, raw: bool) -> list[str]:
    """Return the text of each turn, with the right answer to the turn before in front of it.

    Args:
        task: name.
        example: as in the benchmark's file.
        tokenizer: of transformers.
        raw: whether its chat template is left out.
    """
    form, turns = FORMS[task], example["multi_turns"]
    first, target = _asked(task, turns[0]), _target(turns[0])
    context = form.context.format(context=_context(example), target=target)
    # In a first turn of `mf` the question comes before the numbers alone, and is not repeated.
    question = turns[0]["input"] if task == "scbench_mf" else first
    texts = [chat.first_text(tokenizer, f"{context}\n\n{question}", raw=raw)]
    for before, turn in pairwise(turns):
        answer = str(before["answer"])
        if chat.has_chat(tokenizer, raw=raw):
            texts.append(chat.next_text(tokenizer, answer, _asked(task, turn)) + form.begun)
        else:
            texts.append(f"{answer}\n\n{_asked(task, turn, form.later_raw)}")
    return texts


def of_requests(task: str, example: Example, tokenizer: Any, *, raw: bool) -> list[str]:
    """Return the text of the context, and one of each question that follows it alone.

    Args:
        task: name.
        example: as in the benchmark's file.
        tokenizer: of transformers.
        raw: whether its chat template is left out.
    """
    form, turns = FORMS[task], example["multi_turns"]
    context = form.context.format(context=_context(example), target=turns[0]["input"])
    before, after = chat.parts_around(tokenizer, raw=raw)
    return [before + context, *(_asked(task, turn) + after for turn in turns)]


def _asked(task: str, turn: Example, template: str | None = None) -> str:
    options: Sequence[str] = turn.get("options") or ("",) * 4
    fields = dict(zip("abcd", options, strict=False)) | {"input": turn["input"]}
    if task == "scbench_mf":
        fields["target"] = _target(turn)
    return (template or FORMS[task].question).format(**fields)


def _target(turn: Example) -> str:
    """Return the question that the beginning of an answer, such as "The median is", answers."""
    found = re.search(r"The .+ is", turn["input"])
    return f"What is {found.group().lower()[:-3]}?" if found else ""


def _context(example: Example) -> str:
    return str(example["context"] if "context" in example else example["input"])
