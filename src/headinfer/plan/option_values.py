"""The values of options as users write them, each read or refused.

What reads a value is given the option's name for the message. It takes its own results, too.
"""

import os
from collections.abc import Sequence
from typing import Any, Literal, get_args

from headinfer.errors import OptionError
from headinfer.units import TooManyError, parse_bytes, parse_tokens

DeviceName = Literal["auto", "cpu", "cuda", "simulated"]
DEVICE_NAMES: tuple[DeviceName, ...] = get_args(DeviceName)

FuseName = Literal["auto", "off"]
FUSE_NAMES: tuple[FuseName, ...] = get_args(FuseName)

KVCacheName = Literal["auto", "dense", "packed", "int8", "fp8"]
KV_CACHE_NAMES: tuple[KVCacheName, ...] = get_args(KVCacheName)

TileSize = int | Literal["auto", "all"]


def device_name(name: str, value: object) -> DeviceName:
    """Return the name of a kind of device."""
    if value not in DEVICE_NAMES:
        raise OptionError(f"{name} must be one of {', '.join(DEVICE_NAMES)}, not {value!r}")
    return value


def fuse_name(name: str, value: object) -> FuseName:
    """Return whether parts are fused: by a name."""
    if value not in FUSE_NAMES:
        raise OptionError(f"{name} must be 'auto' or 'off', not {value!r}")
    return value


def size(name: str, value: str | int | None) -> int | None:
    """Return bytes; None for "auto"."""
    return None if value is None or value == "auto" else parse_bytes(value, name)


def kv_cache_name(name: str, value: object) -> KVCacheName:
    """Return the name of a form of the KV cache in host memory."""
    if value not in KV_CACHE_NAMES:
        raise OptionError(f"{name} must be one of {', '.join(KV_CACHE_NAMES)}, not {value!r}")
    return value


def parts(value: Any) -> Sequence[Any]:
    """Return the values of several devices that one was given as, in a list or with commas."""
    if isinstance(value, str):
        return value.split(",")
    return value if isinstance(value, list | tuple) else (value,)


def _counted(name: str, value: str | int, wanted: str) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        return parse_tokens(value)
    except TooManyError as error:
        raise OptionError(f"{name}: {error}") from None
    except OptionError:
        raise OptionError(f"{name} must be {wanted} or 'auto', not {value!r}") from None


def token_count(name: str, value: str | int) -> int | Literal["auto"]:
    """Return a positive number of tokens, or "auto"."""
    return _counted(name, value, "a positive integer")


def tile_size(name: str, value: str | int, wanted: str = "a positive integer") -> TileSize:
    """Return a positive number, "all" or "auto"."""
    return "all" if value == "all" else _counted(name, value, f"{wanted}, 'all'")


def _is_zero(value: object) -> bool:
    return value == "0" or (isinstance(value, int) and not isinstance(value, bool) and value == 0)


def tile_size_or_none(name: str, value: str | int) -> TileSize:
    """Return a number from 0 on, "all" or "auto"."""
    return 0 if _is_zero(value) else tile_size(name, value, "an integer from 0 on")


def token_count_or_none(name: str, value: str | int) -> int | Literal["auto"]:
    """Return a number of tokens from 0 on, or "auto"."""
    return 0 if _is_zero(value) else _counted(name, value, "an integer from 0 on")


def share(name: str, value: str | float) -> float | Literal["auto"]:
    """Return a share from 0 to 1, or "auto"; 0 for "off"."""
    return "auto" if value == "auto" else part(name, value, "'off' or 'auto'")


def part(name: str, value: str | float, other: str = "or 'off'") -> float:
    """Return a share from 0 to 1; 0 for "off"."""
    if value == "off":
        return 0.0
    try:
        given = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        given = -1.0
    if not 0 <= given <= 1:
        raise OptionError(f"{name} must be a share from 0 to 1, {other}, not {value!r}")
    return given


def pattern(name: str, value: object) -> str | None:
    """Return where a pattern is; None for "auto"."""
    if value is None or value == "auto":
        return None
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise OptionError(f"{name} must be a file, a folder or 'random', not {value!r}")
    return str(value)


def folder(name: str, value: object) -> str | None:
    """Return where a folder is; None for none."""
    if value is None or value == "auto":
        return None
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise OptionError(f"{name} must be a folder, not {value!r}")
    return str(value)


def switch(name: str, value: object) -> bool:
    """Return True or False as given."""
    if not isinstance(value, bool):
        raise OptionError(f"{name} must be True or False, not {value!r}")
    return value
