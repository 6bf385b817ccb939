"""Wrong values on the command line, in our own words: the option, the value, what it must be.

The libraries below have a text for each kind of value. They name Python's types, and some leave the
value out.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_WORDS = (
    (r"Value error, ", ""),
    (r"Input should be a valid integer.*", "it must be a whole number"),
    (r"Input should be a valid number.*", "it must be a number"),
    (r"Input should be greater than or equal to (\S+)", r"it must be at least \1"),
    (r"Input should be less than or equal to (\S+)", r"it must be at most \1"),
    (r"\S+ is not a valid (?:int|integer)(?: range)?\.", "it must be a whole number"),
    (r"\S+ is not a valid float\.", "it must be a number"),
    (r"\S+ is not in the range x>=(\S+)\.", r"it must be at least \1"),
    (r"(?:'.*?'|\S+) is not one of ", "it must be one of "),
)
"""Texts of pydantic and of click, as patterns, and ours instead."""


def told(error: Exception, given: Mapping[str, Any]) -> str:
    """Return what is wrong with the usage, in one line.

    Args:
        error: of Typer or click, with their `format_message`.
        given: values as they were written, by the names of parameters.
    """
    parameter = getattr(error, "param", None)
    value = given.get(getattr(parameter, "name", None) or "")
    message = getattr(error, "message", None)
    if isinstance(value, str) and message:
        for pattern, instead in _WORDS:
            message = re.sub(pattern, instead, message)
        return f"{_option(parameter)} {value!r}: {message.rstrip('.')}"
    text: str = error.format_message()  # type: ignore[attr-defined]  # says who calls
    return " ".join(text.split()).rstrip(".")


def _option(parameter: Any) -> str:
    """Return the option as users write it, by its first long name."""
    names: Sequence[str] = parameter.opts
    return next((name for name in names if name.startswith("--")), names[0])
