"""How many tokens a cache is planned for, beside those it is known to hold. Pure arithmetic."""

from headinfer.plan.plan import Plan

_GROWTH_DIVISOR, _LEAST_GROWTH_TOKENS = 4, 1024
"""A cache is planned for a quarter more than it is known to hold, or so many tokens.

An answer and the next turns follow. Where all tokens are resident another plan brings them back
over the link.
"""


def with_growth(tokens: int) -> int:
    """Return the tokens to plan for, where so many are known."""
    return tokens + max(tokens // _GROWTH_DIVISOR, _LEAST_GROWTH_TOKENS)


def outgrows(plan: Plan, tokens: int) -> bool:
    """Whether there are more tokens than a plan knew of, which then is worth another plan.

    It is where all tokens that it knew of are resident, or the CPU was left out for these. Several
    ranks plan anew together, and the CPU may be left out on some of them alone.
    """
    return any(_is_outgrown(part, tokens) for part in plan.of_devices)


def _is_outgrown(part: Plan, tokens: int) -> bool:
    known = part.context_tokens or 0
    left_out = part.host_left_out and part.shape.ranks == 1 and known < tokens
    return known > 0 and (left_out or known <= part.resident_tokens < tokens)
