"""The generation options: which of them the user set."""

from dataclasses import dataclass, fields
from typing import Any

from headinfer.generation.sampling import check_sampling, with_sampling_on


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
        check_sampling(self._given(), flag, greedy="--no-do-sample")

    def keywords(self) -> dict[str, Any]:
        """Return keywords for `generate`: what the user set, and sampling if any of it needs it."""
        return with_sampling_on(self._given())

    def _given(self) -> dict[str, Any]:
        return {
            each.name: value
            for each in fields(self)
            if (value := getattr(self, each.name)) is not None
        }


def flag(name: str) -> str:
    """Return the flag of a generation option, or of an option of `attach`."""
    return f"--{name.removesuffix('_num_tokens').replace('_', '-')}"
