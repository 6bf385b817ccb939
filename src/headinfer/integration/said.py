"""What an attachment says in the log: aloud the first time, as a detail from then on."""

import logging


class SaidOnce:
    """A log in which the same thing is said once at its level, and later at `DEBUG`.

    Args:
        logger: of the module that has something to say.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._said: set[str] = set()

    def say(self, level: int, about: str, message: str, *arguments: object) -> None:
        """Say something.

        Args:
            level: of the first time.
            about: equal for what is the same thing.
            message: with a place for each of the `arguments`, as loggers take it.
            *arguments: what the message is about this time.
        """
        if about in self._said:
            level = logging.DEBUG
        self._said.add(about)
        self._logger.log(level, message, *arguments)


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
