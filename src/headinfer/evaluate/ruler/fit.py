"""How long a sample is made: the most that stays within a length, found in few tries. Pure."""

from collections.abc import Callable

from headinfer.errors import OptionError

_GROWTH = 8
"""How many times longer the next try may be where nothing too long was seen yet."""


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
        OptionError: not even one step fits.
    """
    low, low_tokens = min(step, last or step), tokens_of(min(step, last or step))
    if low_tokens > most_tokens:
        raise OptionError(
            f"a sample has at least {low_tokens:,} tokens, and {most_tokens:,} are allowed"
        )
    base, base_tokens = 0, 0
    high: int | None = None if last is None else last // step * step + step
    while high is None or high - low > step:
        slope = max(1e-9, (low_tokens - base_tokens) / (low - base))
        room = int((most_tokens - low_tokens) / slope) // step * step
        if base and room < step:
            return low  # by what was seen, one step more is too long
        units = low + max(step, min(room, (_GROWTH - 1) * low // step * step))
        if high is not None:
            units = min(units, high - step)
        tokens = tokens_of(units)
        if tokens <= most_tokens:
            base, base_tokens = low, low_tokens
            low, low_tokens = units, tokens
        else:
            high = units
            if base and units - low > step:
                # The slope was too small. Nothing between is known, so the middle is next.
                middle = low + (units - low) // 2 // step * step
                tokens = tokens_of(middle)
                if tokens <= most_tokens:
                    base, base_tokens, low, low_tokens = low, low_tokens, middle, tokens
                else:
                    high = middle
    return low
