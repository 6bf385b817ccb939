"""How long a sample is made: the most that stays within a length, found in few tries. Pure."""

from collections.abc import Callable

from headinfer.errors import OptionError
from headinfer.units import counted

_GROWTH = 8
"""How many times longer the next try may be where nothing too long was seen yet."""


_LEAST_TOKENS = 0.01
"""Tokens of a unit, at least: two samples that are as long by chance say nothing."""


def most_units(
    tokens_of: Callable[[int], int], most_tokens: int, step: int, last: int | None = None
) -> int:
    """Return the most steps of units whose sample stays within so many tokens.

    A sample's tokens grow about linearly with its units. So each try tells how far the next one
    goes, and all tries together cost a few times as much as the last one.

    Args:
        tokens_of: makes a sample of some units, and returns its tokens.
        most_tokens: the most tokens.
        step: units by which samples may differ.
        last: the most units there are.

    Raises:
        OptionError: not even one step fits, or a sample does not grow.
    """
    first = min(step, last or step)
    first_tokens = tokens_of(first)
    if first_tokens > most_tokens:
        raise OptionError(
            f"a sample has at least {counted(first_tokens, 'token')}, and {most_tokens:,} are "
            "allowed"
        )
    low, low_tokens = first, first_tokens
    high = None if last is None else last // step * step + step
    high_tokens: int | None = None
    while high is None or high - low > step:
        if high is not None and high_tokens is not None:
            a_unit = (high_tokens - low_tokens) / (high - low)
        elif low > first:
            a_unit = (low_tokens - first_tokens) / (low - first)  # what all share cancels out
        else:
            a_unit = first_tokens / first
        room = int((most_tokens - low_tokens) / max(a_unit, _LEAST_TOKENS)) // step * step
        if low > first and room < step:
            break  # by what was seen, one step more is too long
        units = low + max(step, min(room, (_GROWTH - 1) * low // step * step))
        if high is not None:
            units = min(units, high - step)
        tokens = tokens_of(units)
        if tokens <= most_tokens:
            low, low_tokens = units, tokens
            if low > most_tokens:
                raise OptionError(
                    f"{low:,} parts of a text have {counted(tokens, 'token')}, by a tokenizer that "
                    "counts less than one for each"
                )
        else:
            high, high_tokens = units, tokens
    return low
