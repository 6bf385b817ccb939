"""Those who are told of the model's calls with one cache.

Hooks of torch would be on the model, which all threads share: torch mixes up the arguments of one
that another thread takes away meanwhile.
"""

from typing import Any


class Watcher:
    """A listener to the model's calls with one cache, but drafts; does nothing by itself."""

    def begin(self) -> None:
        """Hear that a call begins; may raise."""

    def end(self, output: Any) -> None:
        """Hear what a call gave, before the caller does; may change it and may raise."""
