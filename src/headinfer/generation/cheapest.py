"""How many drafts make a token cheapest, by known times and acceptance. Pure Python."""

import itertools
from collections.abc import Mapping, Sequence

_MARGIN = 1.05
"""Gain below which drafting is not worth its uncertainty."""


def expected_tokens(drafts: int, acceptance: float) -> float:
    """Return the tokens that a verification gives on average.

    Args:
        drafts: that are verified.
        acceptance: probability that a draft is accepted if those before it were.
    """
    return sum(acceptance**number for number in range(drafts + 1))


def best_number(
    draft_s: float,
    pass_s: Mapping[int, float],
    acceptance: float,
    numbers: Sequence[int],
    now: int = 0,
) -> int:
    """Return how many tokens to draft for the least time a token.

    Args:
        draft_s: seconds of drafting one token.
        pass_s: seconds of passes that verified so many drafts; that of none must be there. Passes
            between two of them are taken to lie on a line. Longer ones go on like the last two that
            verified drafts; where there is one, like that and the pass without.
        acceptance: probability that a draft is accepted if those before it were.
        numbers: to choose from.
        now: how many were drafted last.

    Returns:
        One of the numbers; what was drafted last, and else 0, where another one gains less than a
        twentieth.
    """

    def token_s(drafts: int) -> float:
        seconds = drafts * draft_s + _pass_s(pass_s, drafts)
        return seconds / expected_tokens(drafts, acceptance)

    best_s, best = min((token_s(number), number) for number in numbers)
    if best_s * _MARGIN >= token_s(0):
        return 0
    return now if now in numbers and token_s(now) <= best_s * _MARGIN else best


def number_to_try(
    draft_s: float,
    pass_s: Mapping[int, float],
    acceptance: float,
    numbers: Sequence[int],
    now: int = 0,
) -> int:
    """Return how many tokens to draft, where another number may be tried in hope.

    The step without drafts may be captured, or attended by other kernels, and passes with drafts
    not. So the time of one number of drafts does not tell what another draft adds. If more drafts
    pay where they add nothing, about twice as many are tried. Then two numbers tell.

    Times need not lie on a line: a pass may be slow only from some rows on. So where a number is
    too slow and far fewer drafts were timed, half of it is tried before it is given up.

    Args:
        draft_s: as for `best_number`, with the others.
        pass_s: with one number of drafts at least.
        acceptance: of drafts.
        numbers: to choose from, the smallest first.
        now: how many were drafted last.
    """
    best, known = best_number(draft_s, pass_s, acceptance, numbers, now), max(pass_s)
    if best > known:
        return best
    if sum(number > 0 for number in pass_s) > 1:
        return _halved(draft_s, pass_s, acceptance, numbers, best)
    flat = {**pass_s, numbers[-1]: pass_s[known]}
    hoped = best_number(draft_s, flat, acceptance, numbers, now)
    return max(number for number in numbers if number <= min(hoped, 2 * known + 1))


def _halved(
    draft_s: float,
    pass_s: Mapping[int, float],
    acceptance: float,
    numbers: Sequence[int],
    best: int,
) -> int:
    """Return half of a number that is too slow, if that pays should it take as long as fewer do."""
    hoped = dict(pass_s)
    for low, high in itertools.pairwise(sorted(number for number in pass_s if number)):
        half = max(number for number in numbers if number <= high // 2)
        if best < high and low < half:
            hoped[half] = pass_s[low]
    return best_number(draft_s, hoped, acceptance, sorted({0, best, *hoped}), best)


def _pass_s(known: Mapping[int, float], drafts: int) -> float:
    """Return the seconds of a pass that verifies so many drafts, by those that are known."""
    if drafts in known:
        return known[drafts]
    low = max(number for number in known if number < drafts)
    above = [number for number in known if number > drafts]
    if above:
        high = min(above)
        share = (drafts - low) / (high - low)
        return known[low] + share * (known[high] - known[low])
    before = max((number for number in known if 0 < number < low), default=0)
    slope = max(known[low] - known[before], 0.0) / (low - before) if low else 0.0
    return known[low] + slope * (drafts - low)
