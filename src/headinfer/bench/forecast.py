"""How long a run will still take. Pure Python, never torch."""

_START_TOKENS = 16384
"""Starting a process and loading a model, counted as tokens of a context that is prefilled."""

_SQUARE_TOKENS = 32768
"""Context at which the square of tokens takes as long as their number."""

_RANDOM_TOKENS = 8
"""Tokens of a random fill that take as long as one of a prefill."""


class Forecast:
    """A guess of the time left, from the trials so far: each method's own, scaled to the context.

    Args:
        trials: method and tokens of each trial to come.
        prefills: whether the prompts pass through the model.
    """

    def __init__(self, trials: list[tuple[str, int]], *, prefills: bool) -> None:
        self._prefills = prefills
        self._left = list(trials)
        self._known = bool(trials)
        self._speeds: dict[str, float] = {}

    def finished(self, method: str, tokens: int, seconds: float) -> None:
        """Take note of a trial that ran."""
        self.dropped(method, tokens)
        self._speeds[method] = seconds / self._weight(tokens)

    def dropped(self, method: str, tokens: int) -> None:
        """Take note that one trial fewer is to come."""
        if (method, tokens) in self._left:
            self._left.remove((method, tokens))

    def left_s(self) -> float | None:
        """Return the seconds left; None before any trial ran, or where nobody knows what comes."""
        if not self._speeds or not self._known:
            return None
        usual = sum(self._speeds.values()) / len(self._speeds)
        return sum(
            self._speeds.get(method, usual) * self._weight(tokens) for method, tokens in self._left
        )

    def _weight(self, tokens: int) -> float:
        if not self._prefills:
            return _START_TOKENS + tokens / _RANDOM_TOKENS
        return _START_TOKENS + tokens + tokens * tokens / _SQUARE_TOKENS
