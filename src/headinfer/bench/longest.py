"""The longest context that runs, found by running. Pure Python, never torch."""

from collections.abc import Callable

_STEP_TOKENS = 1024
_PRECISION_DIVISOR = 16
"""The search ends when the longest that ran is within a sixteenth of one that did not."""


def longest_context(runs: Callable[[int], bool], *, first: int, last: int) -> int:
    """Return the longest context found to run: it is doubled until it fails, then bisected.

    Args:
        runs: tries one context.
        first: the first to try; multiples of 1K between it and 0 follow where it fails.
        last: the longest to try.

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
    while high - low > max(_STEP_TOKENS, low // _PRECISION_DIVISOR):
        middle = (low + high) // 2 // _STEP_TOKENS * _STEP_TOKENS
        if not low < middle < high:
            break
        low, high = (middle, high) if runs(middle) else (low, middle)
    return low
