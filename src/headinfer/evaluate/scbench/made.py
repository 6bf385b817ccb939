"""Made-up examples in SCBench's format, for a machine that has none of its data.

The four are the synthetic ones that the benchmark's paper describes. They are a dictionary of
random UUIDs, strings to be found by both their ends, variables to be traced, and numbers to be
looked through. An example is as long as a context allows.
"""

import random
import string
import uuid
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from headinfer.errors import OptionError
from headinfer.evaluate.prompts.examples import Example
from headinfer.evaluate.scbench.prompts import of_turns
from headinfer.units import counted, format_tokens

_TURNS = 5
_ENDS = 4
"""Letters of a string's ends by which it is asked for."""

_FEWEST = {"scbench_kv": 5, "scbench_prefix_suffix": 5, "scbench_vt": 10, "scbench_mf": 5}
_HOPS = 2
_FILLER = "The grass is green. The sky is blue. The sun is yellow."


def fitted(task: str, seed: str, context_tokens: int, tokenizer: Any, *, raw: bool) -> Example:
    """Return the largest example whose turns fit into a context.

    Args:
        task: name in `MAKERS`.
        seed: of all that is drawn.
        context_tokens: the most tokens of all its turns, with what is put around them.
        tokenizer: of transformers.
        raw: whether its chat template is left out.

    Raises:
        OptionError: not even the smallest fits.
    """

    def made(entries: int) -> Example:
        # A text as a seed gives the same numbers in every version of Python.
        return MAKERS[task](random.Random(seed), entries)

    def tokens(entries: int) -> int:
        texts = of_turns(task, made(entries), tokenizer, raw=raw)
        return sum(len(tokenizer(text)["input_ids"]) for text in texts)

    fewest = _FEWEST[task]
    if (least := tokens(fewest)) > context_tokens:
        raise OptionError(
            f"{task}: the smallest example has {counted(least, 'token')}, and a prompt at most "
            f"{format_tokens(context_tokens)}; give more with --contexts"
        )
    fits, too_many = fewest, 2 * fewest
    while tokens(too_many) <= context_tokens:
        fits, too_many = too_many, 2 * too_many
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if tokens(middle) <= context_tokens:
            fits = middle
        else:
            too_many = middle
    return made(fits)


def _turns(*asked: tuple[str, Any]) -> list[Example]:
    return [{"input": question, "answer": answer} for question, answer in asked]


def _kv(drawn: random.Random, entries: int) -> Example:
    """Make a dictionary of random UUIDs, some of which are asked for."""

    def identifier() -> str:
        return str(uuid.UUID(int=drawn.getrandbits(128), version=4))

    pairs = {identifier(): identifier() for _ in range(entries)}
    held = ", ".join(f'"{key}": "{value}"' for key, value in pairs.items())
    asked = [
        (f'Key: "{key}"\nThe value associated with the specified key is: ', pairs[key])
        for key in drawn.sample(list(pairs), _TURNS)
    ]
    return {"context": f"JSON data:\n{{{held}}}", "multi_turns": _turns(*asked)}


def _prefix_suffix(drawn: random.Random, entries: int) -> Example:
    """Make strings of several lengths, some of which are asked for by their ends."""
    strings = [
        "".join(drawn.choices(string.ascii_lowercase, k=drawn.randrange(10, 21)))
        for _ in range(entries)
    ]
    asked = [
        (
            f'Find the string that begins with "{each[:_ENDS]}" and ends with "{each[-_ENDS:]}". '
            "The string is: ",
            each,
        )
        for each in drawn.sample(strings, _TURNS)
    ]
    context = "Below is a list of strings.\n\n" + "\n".join(strings)
    return {"context": context, "multi_turns": _turns(*asked)}


def _vt(drawn: random.Random, entries: int) -> Example:
    """Make chains of assignments among filler; all variables of a value are asked for."""
    lines, asked = [], []
    for value in drawn.sample(range(10000, 100000), _TURNS):
        names = ["".join(drawn.choices(string.ascii_uppercase, k=5)) for _ in range(_HOPS)]
        lines.append(f"VAR {names[0]} = {value}")
        lines += [f"VAR {name} = VAR {before}" for before, name in pairwise(names)]
        asked.append(
            (
                f"Find all variables that are assigned the value {value} in the text above. "
                f"The {_HOPS} variables are: ",
                names,
            )
        )
    # A variable is assigned after the one that it is assigned from.
    places = sorted(drawn.randrange(entries + 1) for _ in lines)
    text = [_FILLER] * entries
    for place, line in reversed(list(zip(places, lines, strict=True))):
        text.insert(place, line)
    context = "Memorize the chain of variable assignments hidden in the text.\n\n" + "\n".join(text)
    return {"context": context, "multi_turns": _turns(*asked)}


def _mf(drawn: random.Random, entries: int) -> Example:
    """Make a list of numbers; its extremes, its middle and its neighbours are asked for."""
    numbers = [drawn.randrange(100) for _ in range(entries - entries % 2 + 1)]
    ranked = sorted(numbers)
    asked = [
        ("The largest number is", ranked[-1]),
        ("The smallest number is", ranked[0]),
        ("The median number is", ranked[len(ranked) // 2]),
        ("The second largest number is", ranked[-2]),
        ("The second smallest number is", ranked[1]),
    ]
    return {"context": numbers, "multi_turns": _turns(*asked)}


MAKERS: dict[str, Callable[[random.Random, int], Example]] = {
    "scbench_kv": _kv,
    "scbench_prefix_suffix": _prefix_suffix,
    "scbench_vt": _vt,
    "scbench_mf": _mf,
}
"""The tasks that can be made up, each from a draw and a number of entries."""
