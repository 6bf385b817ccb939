"""The generation options: their ranges, and which of them the user set."""

import math
from dataclasses import dataclass, fields
from typing import Any

from headinfer.errors import OptionError

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
SAMPLING_NAMES = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """A set of options with the names and meanings of transformers' `GenerationConfig`.

    None leaves an option to the model's own generation config.
    """

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    prompt_lookup_num_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check all ranges.

        Raises:
            OptionError: a value is out of range, or goes against another one.
        """
        for name in _REAL_NAMES:
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise OptionError(f"{flag(name)} must be a finite number, not {number:g}")
        for name in _WHOLE_NAMES:
            if (getattr(self, name) or 0) > _MOST:
                raise OptionError(
                    f"{flag(name)} must be at most {_MOST:,}, not {getattr(self, name)}"
                )
        greedy_hint = "; for greedy decoding give --no-do-sample"
        for name, good, wanted in (
            ("max_new_tokens", _at_least(self.max_new_tokens, 1), "at least 1"),
            ("temperature", _above(self.temperature, 0), f"above 0{greedy_hint}"),
            ("top_k", _at_least(self.top_k, 0), "at least 0 (0: off)"),
            ("top_p", _within(self.top_p), "above 0 and at most 1"),
            ("min_p", self.min_p == 0 or _within(self.min_p), "from 0 to 1"),
            ("repetition_penalty", _above(self.repetition_penalty, 0), "above 0"),
            ("no_repeat_ngram_size", _at_least(self.no_repeat_ngram_size, 0), "at least 0"),
            ("num_beams", _at_least(self.num_beams, 1), "at least 1"),
            ("prompt_lookup_num_tokens", _at_least(self.prompt_lookup_num_tokens, 1), "at least 1"),
        ):
            if not good:
                value = getattr(self, name)
                raise OptionError(f"{flag(name)} must be {wanted}, not {value:g}")
        set_names = [name for name in SAMPLING_NAMES if getattr(self, name) is not None]
        if set_names and self.do_sample is False:
            raise OptionError(
                f"{flag(set_names[0])} only matters when sampling; leave out --no-do-sample"
            )
        beams = self.num_beams or 1
        if self.length_penalty is not None and beams < 2:
            raise OptionError("--length-penalty only matters with --num-beams of 2 or more")
        if self.prompt_lookup_num_tokens is not None and beams > 1:
            raise OptionError("--prompt-lookup cannot be used with --num-beams")

    def keywords(self) -> dict[str, Any]:
        """Return keywords for `generate`: what the user set, and sampling if any of it needs it."""
        given = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) is not None
        }
        if any(name in given for name in SAMPLING_NAMES):
            given["do_sample"] = True
        return given


def flag(name: str) -> str:
    """Return the flag of a generation option, or of an option of `attach`."""
    return f"--{name.removesuffix('_num_tokens').replace('_', '-')}"


def _above(value: float | None, low: float) -> bool:
    return value is None or value > low


def _at_least(value: float | None, low: float) -> bool:
    return value is None or value >= low


def _within(value: float | None) -> bool:
    return value is None or 0 < value <= 1
