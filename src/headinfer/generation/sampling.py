"""What users may set of how tokens are chosen, and what turns sampling on."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from headinfer.errors import OptionError

SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p")
"""Settings that mean something when tokens are drawn, and nothing otherwise."""

_MOST = 2**31 - 1
"""The largest whole number that all of torch and tokenizers take."""

_WHOLE_NAMES = (
    "max_new_tokens",
    "top_k",
    "no_repeat_ngram_size",
    "num_beams",
    "prompt_lookup_num_tokens",
)
_REAL_NAMES = ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty")


def with_sampling_on(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings, with sampling where any of them needs it.

    Args:
        given: keywords for transformers' `generate`. A `do_sample` among them stays.
    """
    drawn = any(given.get(name) is not None for name in SAMPLING_NAMES)
    return {"do_sample": True, **given} if drawn else dict(given)


def check_sampling(
    given: Mapping[str, Any],
    spelled: Callable[[str], str] = str,
    greedy: str = "do_sample=False",
) -> None:
    """Refuse what is out of range, or goes against another setting.

    Args:
        given: settings of how tokens are chosen, each of its kind; others are left alone.
        spelled: returns a setting's name as the user writes it.
        greedy: how the user asks for greedy decoding.

    Raises:
        OptionError: names the setting, and what it must be.
    """
    numbers = {
        name: value
        for name, value in given.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    _check_ranges(numbers, spelled, greedy)
    set_names = [name for name in SAMPLING_NAMES if given.get(name) is not None]
    if set_names and given.get("do_sample") is False:
        raise OptionError(f"{spelled(set_names[0])} only matters when sampling; leave out {greedy}")
    beams = numbers.get("num_beams", 1)
    named = spelled("num_beams")
    if "length_penalty" in numbers and beams < 2:
        raise OptionError(f"{spelled('length_penalty')} only matters with {named} of 2 or more")
    if given.get("prompt_lookup_num_tokens") is not None and beams > 1:
        raise OptionError(f"{spelled('prompt_lookup_num_tokens')} cannot be used with {named}")


def _check_ranges(numbers: Mapping[str, float], spelled: Callable[[str], str], greedy: str) -> None:
    for name in _REAL_NAMES:
        if name in numbers and not math.isfinite(numbers[name]):
            raise OptionError(f"{spelled(name)} must be a finite number, not {numbers[name]:g}")
    for name in _WHOLE_NAMES:
        if numbers.get(name, 0) > _MOST:
            raise OptionError(f"{spelled(name)} must be at most {_MOST:,}, not {numbers[name]}")
    for name, is_right, wanted in (
        ("max_new_tokens", _from(1), "at least 1"),
        ("temperature", _above_0, f"above 0; for greedy decoding give {greedy}"),
        ("top_k", _from(0), "at least 0 (0: off)"),
        ("top_p", _is_share, "above 0 and at most 1"),
        ("min_p", lambda value: value == 0 or _is_share(value), "from 0 to 1"),
        ("repetition_penalty", _above_0, "above 0"),
        ("no_repeat_ngram_size", _from(0), "at least 0"),
        ("num_beams", _from(1), "at least 1"),
        ("prompt_lookup_num_tokens", _from(1), "at least 1"),
    ):
        if name in numbers and not is_right(numbers[name]):
            raise OptionError(f"{spelled(name)} must be {wanted}, not {numbers[name]:g}")


def _from(least: int) -> Callable[[float], bool]:
    return lambda value: value >= least


def _above_0(value: float) -> bool:
    return value > 0


def _is_share(value: float) -> bool:
    return 0 < value <= 1
