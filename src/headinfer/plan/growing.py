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
    """Whether a plan kept all tokens it knew of on a device, and there are more now."""
    return any(
        0 < (part.context_tokens or 0) <= part.resident_tokens < tokens for part in plan.of_devices
    )
