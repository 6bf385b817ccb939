"""What is wrong with a request's body, in our words and without what the body has there."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from headinfer.server.problems import ProblemError

_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number of 64 bits",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "finite_number": "a finite number",
    "string_unicode": "text in Unicode",
    "greater_than": "larger than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "smaller than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "one of {expected}",
    "enum": "one of {expected}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}
"""What a value must be, by the kind of mistake that pydantic finds."""

_OF_UNIONS = re.compile(r"str|int|float|bool|.*[\[\],(].*")
"""Parts of a place that name a member of a union, and no field."""


def mistake_of(error: RequestValidationError) -> ProblemError:
    """Return the first mistake of a body.

    Args:
        error: of FastAPI.
    """
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        return ProblemError(400, "the body is not JSON")
    place = _place(errors[0])
    if not place:
        return ProblemError(
            400, "the body must be a JSON object, sent with Content-Type: application/json"
        )
    # Within a union the member that was meant is the one whose mistake lies deepest.
    place = max(
        (_place(error) for error in errors if _place(error)[: len(place)] == place), key=len
    )
    name = ".".join(place)
    if any(error["type"] == "missing" for error in errors if _place(error) == place):
        return ProblemError(400, f"{name} is missing", param=place[0])
    wanted = _wanted(errors, place)
    return ProblemError(400, f"{name} must be {wanted}", param=place[0])


def _place(error: Mapping[str, Any]) -> list[str]:
    """Return the fields and numbers that lead to a mistake."""
    parts = [part for part in error["loc"] if part not in ("body", "query", "path")]
    return [str(part) for part in parts if isinstance(part, int) or not _OF_UNIONS.fullmatch(part)]


def _wanted(errors: Sequence[Mapping[str, Any]], place: list[str]) -> str:
    """Return what may stand in a place; a union of types has a mistake for each of them."""
    here = [_must_be(error) for error in errors if _place(error) == place]
    return " or ".join(dict.fromkeys(here))


def _must_be(error: Mapping[str, Any]) -> str:
    told = _KINDS.get(error["type"], "something else")
    return told.format_map(error.get("ctx", {}))
