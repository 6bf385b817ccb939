"""The longest context that runs, found by running. Pure Python, never torch."""

from collections.abc import Callable

_STEP_TOKENS = 1024
_PRECISION_DIVISOR = 16
"""The search ends when the longest that ran is within a sixteenth of one that did not."""


def longest_context(
    runs: Callable[[int], bool], *, first: int, last: int, step_tokens: int = _STEP_TOKENS
) -> int:
    """Return the longest context found to run: it is doubled until it fails, then bisected.

    Args:
        runs: tries one context.
        first: the first to try; shorter ones follow where it fails.
        last: the longest to try.
        step_tokens: contexts between those that are doubled are multiples of it.

    Returns:
        A context that ran, and 0 where none did.
    """
    low, high, tokens = 0, 0, first
    while not high:
        if not runs(tokens):
            high = tokens
        elif tokens >= last:
            return tokens
        else:
            low, tokens = tokens, min(2 * tokens, last)
    while high - low > max(step_tokens, low // _PRECISION_DIVISOR):
        middle = (low + high) // 2 // step_tokens * step_tokens
        if not low < middle < high:
            break
        low, high = (middle, high) if runs(middle) else (low, middle)
    return low
