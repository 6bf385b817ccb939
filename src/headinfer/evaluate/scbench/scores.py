"""Scores of SCBench's answers, by the rules of its own `scbench/compute_scores.py`.

A right answer that is a string is one answer here. That script goes through the letters of such
strings for `scbench_many_shot` and `scbench_qa_chn`, so that almost any response scores.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

from headinfer.errors import OptionError
from headinfer.evaluate.prompts.examples import Example
from headinfer.evaluate.scbench.functions import Function, names_function

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟"  # noqa: RUF001
    "〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)
_ROUGE = "rouge-score"


def expected(task: str, turn: Example) -> tuple[str, ...]:
    """Return the right answers to a turn."""
    answer = turn["answer"]
    if task == "scbench_choice_eng":
        return answer, "ABCD"[list(turn["options"]).index(answer)]
    return tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)


def score(
    task: str, response: str, turn: Example, example: Example, functions: Sequence[Function]
) -> float:
    """Return the score of a response, from 0 to 1.

    Args:
        task: the turn's own, where an example mixes several.
        response: of the model.
        turn: with the right answer.
        example: that the turn is of.
        functions: of the same repository, one of which is asked for.

    Raises:
        OptionError: a library that the score needs is missing.
    """
    right = expected(task, turn)
    if task in ("scbench_kv", "scbench_prefix_suffix"):
        return float(right[0] in response)
    if task in ("scbench_qa_eng", "scbench_many_shot"):
        return float(any(answer.upper() in response.upper() for answer in right))
    if task == "scbench_vt":
        found = sum(answer.lower() in response.lower() for answer in right)
        return round(found / len(right), 2)
    if task == "scbench_passkey":
        return float(next(iter(re.findall("[0-9]+", response)), "") == right[0])
    if task == "scbench_mf":
        return float(_same_number(response, turn["answer"]))
    if task == "scbench_qa_chn":
        return max(_f1(_characters(response), _characters(answer)) for answer in right)
    if task == "scbench_choice_eng":
        return float(_names_choice(response, right))
    if task == "scbench_summary":
        return _rouge(response, right[0])
    assert task == "scbench_repoqa", task
    return float(names_function(response, turn["name"], functions, example["lang"]))


def check_libraries(tasks: Sequence[str]) -> None:
    """Refuse tasks whose scores need a library that is missing.

    Raises:
        OptionError: one is.
    """
    if any("summary" in task for task in tasks):
        _rouge("", "")
    if any("repoqa" in task for task in tasks):
        names_function("```\npass\n```", "", (), "python")  # without a block, nothing is parsed


def _same_number(response: str, right: Any) -> bool:
    found = re.search(r"\d+\.\d+|\d+", response)
    if found is None:
        return False
    number = float(found.group())
    return int(number) == right if isinstance(right, int) else number == float(right)


def _characters(text: str) -> list[str]:
    """Return what is left of a Chinese answer, a character a token."""
    ignored = set(string.punctuation + _CHINESE_PUNCTUATION)
    return [letter for letter in "".join(text.lower().split()) if letter not in ignored]


def _f1(given: Sequence[str], right: Sequence[str]) -> float:
    same = sum((Counter(given) & Counter(right)).values())
    return 2 * same / (len(given) + len(right)) if same else 0.0


def _names_choice(response: str, right: Sequence[str]) -> bool:
    """Whether a response names the right choice, by its letter or its text."""
    response = response.strip()
    if not response:
        return False
    if response[0] in "ABCD":
        return response[0] in right
    if response in right:
        return True
    response = re.sub(" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", response))
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        _, found, after = response.partition(prefix)
        if found:
            return any(after[1:].startswith(answer) for answer in right)
    # A word such as AB is taken for a choice too, as the official rule does.
    return next((word in right for word in response.split() if word in "ABCD"), False)


def _rouge(response: str, right: str) -> float:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise OptionError(f"scores of summaries need a library: pip install {_ROUGE}") from error
    return float(RougeScorer(["rougeLsum"]).score(right, response)["rougeLsum"].fmeasure)
