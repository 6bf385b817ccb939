"""Flags of how tokens are chosen, which every verb has that generates, and what they add up to."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from headinfer.cli.options import NO_VALUE, sampling_option
from headinfer.cli.sampling import GenerationOptions
from headinfer.errors import OptionError
from headinfer.generation.settings import DEFAULT_NEW_TOKENS

_FLAGS: dict[str, Any] = {
    "max_new_tokens": Annotated[
        int | None,
        sampling_option(
            "--max-new-tokens",
            "-n",
            help_text=f"The most tokens to generate, by default {DEFAULT_NEW_TOKENS}.",
        ),
    ],
    "do_sample": Annotated[
        bool,
        sampling_option(
            "--do-sample",
            help_text="Sample; --temperature, --top-k, --top-p and --min-p turn it on, too.",
            metavar=NO_VALUE,
        ),
    ],
    "no_do_sample": Annotated[
        bool,
        sampling_option("--no-do-sample", help_text="Take the likeliest token.", metavar=NO_VALUE),
    ],
    "temperature": Annotated[
        float | None, sampling_option("--temperature", help_text="Above 1 more varied.")
    ],
    "top_k": Annotated[
        int | None, sampling_option("--top-k", help_text="Sample from so many tokens; 0: all.")
    ],
    "top_p": Annotated[
        float | None,
        sampling_option("--top-p", help_text="Sample from this share of probability."),
    ],
    "min_p": Annotated[
        float | None,
        sampling_option("--min-p", help_text="Leave out tokens below this share of the likeliest."),
    ],
    "repetition_penalty": Annotated[
        float | None, sampling_option("--repetition-penalty", help_text="1: none.")
    ],
    "no_repeat_ngram_size": Annotated[
        int | None,
        sampling_option("--no-repeat-ngram-size", help_text="Never repeat so many tokens; 0: off."),
    ],
    "num_beams": Annotated[
        int | None,
        sampling_option("--num-beams", help_text="Beams; from 2 on, text comes at the end."),
    ],
    "length_penalty": Annotated[
        float | None,
        sampling_option("--length-penalty", help_text="Of beams; above 0 prefers longer ones."),
    ],
    "prompt_lookup": Annotated[
        int | None,
        sampling_option(
            "--prompt-lookup",
            help_text="Guess so many tokens at a time from the prompt: same text, fewer steps.",
        ),
    ],
    "prompt_lookup_num_tokens": Annotated[
        int | None,
        # The name that transformers has; too long for the help on a narrow terminal.
        sampling_option(
            "--prompt-lookup-num-tokens", help_text="The same as --prompt-lookup.", hidden=True
        ),
    ],
}

BEAMS = ("num_beams", "length_penalty")
"""Those that need a cache of several rows."""


def with_sampling(*left_out: str) -> Callable[[Callable[..., None]], Any]:
    """Give a verb the flags of sampling, in the place of its parameter `sampling`.

    The verb is given `sampling`: what the user wrote, by flag, for `generation_options`.

    Args:
        left_out: names of flags that the verb does not have.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        wanted = [_parameter(name) for name in _FLAGS if name not in left_out]
        signature = inspect.signature(verb)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            parameters += wanted if parameter.name == "sampling" else [parameter]

        @functools.wraps(verb)
        def run(**given: Any) -> None:
            sampling = {part.name: given.pop(part.name) for part in wanted if part.name in given}
            verb(sampling=sampling, **given)

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {part.name: part.annotation for part in parameters}
        return run

    return decorate


def _parameter(name: str) -> inspect.Parameter:
    annotation = _FLAGS[name]
    default = False if annotation.__origin__ is bool else None
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, annotation=annotation, default=default)


def generation_options(sampling: Mapping[str, Any]) -> GenerationOptions:
    """Return the options that flags add up to.

    Args:
        sampling: what the user wrote, by flag.

    Raises:
        OptionError: a value is out of range, or goes against another one.
    """
    given = dict(sampling)
    yes, no = given.pop("do_sample", False), given.pop("no_do_sample", False)
    if yes and no:
        raise OptionError("--do-sample and --no-do-sample exclude each other; give one")
    lookup, same = given.pop("prompt_lookup", None), given.pop("prompt_lookup_num_tokens", None)
    if lookup is not None and same is not None:
        raise OptionError("--prompt-lookup and --prompt-lookup-num-tokens are one option; give one")
    return GenerationOptions(
        **given,
        do_sample=True if yes else False if no else None,
        prompt_lookup_num_tokens=same if lookup is None else lookup,
    )
