"""Sizes and token counts as people write them: GiB is 2**30 bytes, K tokens is 1024."""

import operator
import re
from decimal import Decimal

from headinfer.errors import OptionError

_BYTE_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_TOKEN_UNITS = {"": 1, "K": 1024, "M": 1024**2}
_MAX_TOKENS = 2**36
_MAX_BYTES = 2**60
_LEAST_WITHOUT_UNIT = 2**20
_QUANTITY = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


class TooManyError(OptionError):
    """A count is one, and larger than any that makes sense."""


def _parse(text: str, units: dict[str, int], what: str, example: str, of: str = "") -> int:
    match = _QUANTITY.fullmatch(text)
    factor = units.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise OptionError(f"{of}{text!r} is not a {what}; write for example {example}")
    return int(Decimal(match[1].replace("_", "")) * factor)  # exact beyond 2**53


def _integer(value: object) -> int | None:
    """Return an integer of any kind; None for all else, also for True and False."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # that is what is asked
    except TypeError:
        return None


def _wrong_kind(value: object, of: str, wanted: str) -> OptionError:
    whole = isinstance(value, float) and value.is_integer()
    hint = f"; write {int(value)}" if isinstance(value, float) and whole else ""
    return OptionError(f"{of}{wanted}, not {value!r}{hint}")


def parse_bytes(size: str | int, name: str | None = None) -> int:
    """Return `size` in bytes.

    Args:
        size: bytes as an integer, or text such as "24GiB", "24GB" or "512MiB"; without a unit at
            least a MiB, for whoever writes 24 means GiB.
        name: of the option, for messages.

    Raises:
        OptionError: the text is not a size, or the size is not positive or too small; or it is
            neither text nor an integer.
    """
    of = "" if name is None else f"{name}: "
    number_bytes = _integer(size)
    if number_bytes is not None:
        size_bytes, without_unit = number_bytes, True
    elif not isinstance(size, str):
        wanted = "a memory size must be text such as '24GiB', or an integer of bytes"
        raise _wrong_kind(size, of, wanted)
    else:
        size_bytes = _parse(size, _BYTE_UNITS, "memory size", "24GiB", of)
        without_unit = size.strip()[-1].isdigit()
    if size_bytes <= 0:
        raise OptionError(f"{of}a memory size must be positive, not {size!r}")
    if without_unit and size_bytes < _LEAST_WITHOUT_UNIT:
        number = str(size).strip()
        exact = "" if "." in number else f" (or '{number}B')"
        raise OptionError(f"{of}{size!r} is in bytes; did you mean '{number}GiB'?{exact}")
    if size_bytes > _MAX_BYTES:
        raise OptionError(f"{of}{size!r} is more than 1024 PiB, the most one may ask for")
    return size_bytes


def parse_tokens(count: str | int, name: str | None = None) -> int:
    """Return `count` in tokens.

    Args:
        count: tokens as an integer, or text such as "128K", "1M" or "1_000_000".
        name: of the option, for messages.

    Raises:
        OptionError: the text is not a count, or the count is not whole and positive; or it is
            neither text nor an integer.
        TooManyError: the count is beyond reason.
    """
    of = "" if name is None else f"{name}: "
    tokens = _integer(count)
    if tokens is None and not isinstance(count, str):
        raise _wrong_kind(count, of, "a token count must be an integer, or text such as '128K'")
    if tokens is None:
        text = str(count)
        tokens = _parse(text, _TOKEN_UNITS, "token count", "128K", of)
        if "." in text and text.strip()[-1].isdigit():
            raise OptionError(f"{of}a token count must be whole, not {count!r}")
    if tokens <= 0:
        raise OptionError(f"{of}a token count must be positive, not {count!r}")
    if tokens > _MAX_TOKENS:
        raise TooManyError(f"{of}{count!r} is more than {_MAX_TOKENS:,}, the most one may ask for")
    return tokens


def format_bytes(size_bytes: float) -> str:
    """Return a size for people: the largest binary unit that keeps it at 1 or more."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes:.0f} B"


def exact_bytes(size_bytes: int) -> str:
    """Return a size as text that `parse_bytes` takes back: "24GiB", "24GB" or "1001B"."""
    factor, unit = max(
        (_BYTE_UNITS[unit.upper()], unit)
        for unit in ("TiB", "TB", "GiB", "GB", "MiB", "MB", "KiB", "KB", "B")
        if size_bytes % _BYTE_UNITS[unit.upper()] == 0
    )
    return f"{size_bytes // factor}{unit}"


def format_seconds(seconds: float) -> str:
    """Return a time for people, with two or three digits: 31 ms, 5.14 s, 37.9 min or 9.81 h."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.2g} ms" if seconds < 0.0995 else f"{seconds * 1000:.0f} ms"
    for unit, size, most in (("s", 1, 60), ("min", 60, 60), ("h", 3600, 48)):
        if seconds < size * most * 0.9995:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.3g} days"


def format_tokens(tokens: int) -> str:
    """Return a token count for people: exact multiples of 1024 with K or M, all else in digits."""
    for suffix, factor in (("M", 1024**2), ("K", 1024)):
        if tokens >= factor and tokens % factor == 0:
            return f"{tokens // factor}{suffix}"
    return f"{tokens:,}"


def plural(count: float, one: str) -> str:
    """Return a noun as it stands behind a number: "token" behind 1, else "tokens".

    Args:
        count: the number as it is shown: 1.0 has digits, and takes the plural, where 1 does not.
        one: of them.
    """
    if count == 1:
        return one
    return f"{one}es" if one.endswith("s") else f"{one}s"


def counted(count: int, one: str) -> str:
    """Return a count for people with its noun: 1 KV head, 1,500 rows, 2 processes."""
    return f"{count:,} {plural(count, one)}"


def counted_tokens(tokens: int, one: str = "token") -> str:
    """Return a token count for people with its noun: 1 token, 128K tokens, 8K positions."""
    return f"{format_tokens(tokens)} {plural(tokens, one)}"


def format_si(value: float, unit: str = "") -> str:
    """Return three significant digits with a prefix of 1000: 17.2G, or 165 TFLOP/s with a unit."""
    prefixes = iter(("", *"KMGTPEZY"))
    prefix = next(prefixes)
    while abs(value) >= 999.5 and prefix != "Y":
        value /= 1000
        prefix = next(prefixes)
    number = f"{value:#.3g}".rstrip(".")
    return f"{number} {prefix}{unit}" if unit else f"{number}{prefix}"
