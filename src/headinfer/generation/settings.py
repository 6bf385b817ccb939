"""What a model's own generation config asks for, beside what the user asked for.

Settings that transformers honours with our cache and a streamer hold as they are. The rest do not
hold here, and the user is told.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headinfer.errors import OptionError
from headinfer.generation.config_check import SETTINGS
from headinfer.generation.meant import did_you_mean
from headinfer.generation.sampling import check_sampling, with_sampling_on

DEFAULT_NEW_TOKENS = 256

_LOOKUP = "prompt_lookup_num_tokens"
_ONE_ANSWER = "one answer is written"
_TEXT_ONLY = "only text is written"
_NOT_OURS = "transformers has it in repositories of their own"
_NO_DRAFTS = "nothing is drafted but by {prompt_lookup_num_tokens} and {assistant}"

_NOT_HELD: dict[str, tuple[Any, str]] = {
    "num_return_sequences": (1, _ONE_ANSWER),
    "use_cache": (True, "HeadInfer is the cache"),
    "cache_implementation": (None, "HeadInfer is the cache"),
    "prefill_chunk_size": (None, "{chunk_tokens} does it"),
    "guidance_scale": (1.0, "it runs the model beside the cache"),
    "token_healing": (False, "the prompt stays as it is"),
    "num_beam_groups": (1, _NOT_OURS),
    "diversity_penalty": (0.0, _NOT_OURS),
    "penalty_alpha": (None, _NOT_OURS),
    "dola_layers": (None, _NOT_OURS),
    "constraints": (None, _NOT_OURS),
    "force_words_ids": (None, _NOT_OURS),
    "low_memory": (None, _NOT_OURS),
    "is_assistant": (False, _NO_DRAFTS),
    "assistant_early_exit": (None, _NO_DRAFTS),
    "speculation_type": (None, _NO_DRAFTS),
    "use_mtp": (None, _NO_DRAFTS),
    "output_attentions": (False, _TEXT_ONLY),
    "output_hidden_states": (False, _TEXT_ONLY),
    "output_scores": (False, _TEXT_ONLY),
    "output_logits": (False, _TEXT_ONLY),
    "return_dict_in_generate": (False, _TEXT_ONLY),
}
"""Fields of a generation config, the value that holds here instead, and why.

A reason has the names of options in braces.
"""

_USUAL_CACHES = ("dynamic", "hybrid")
"""Stock caches that many checkpoints name, and that change no result: nothing to tell."""


_ELSEWHERE = {
    "prompt_lookup": "it is prompt_lookup_num_tokens here",
    "system": "give messages as the prompt, the first with the role 'system'",
    "session": "offload.load_cache reads a session, and model.generate goes on from its cache",
    "save_session": "cache.save writes one, of a cache that model.generate was given",
}
"""What others than `headinfer.generate` call an option, or do; by the names that users try."""

_PASSED_ON = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
"""Keywords of transformers' `generate` beside the fields of its config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A set of settings of one answer: the user's, then the model's own.

    Attributes:
        keywords: for transformers' `generate`.
        rows: of the cache.
        max_new_tokens: the most tokens to generate.
        max_time_s: after which `generate` stops, if at all.
        stop_strings: which end the answer.
        end_ids: tokens which end the answer.
        lookup_tokens: to draft at a time from the text so far; None for no such drafts.
        lookup_ngram_tokens: the most tokens to look for there.
        left_out: what of the model's own does not hold, and why, with options in braces.
    """

    keywords: dict[str, Any]
    rows: int
    max_new_tokens: int
    max_time_s: float | None
    stop_strings: tuple[str, ...]
    end_ids: frozenset[int]
    lookup_tokens: int | None
    lookup_ngram_tokens: int
    left_out: tuple[str, ...]

    def note(self, spelled: Callable[[str], str] = str) -> str | None:
        """Return what the user should know, if anything.

        Args:
            spelled: returns an option's name as the user writes it.
        """
        if not self.left_out:
            return None
        told = re.sub(r"{(\w+)}", lambda found: spelled(found[1]), ", ".join(self.left_out))
        return f"of the model's own generation settings these do not hold here: {told}"


def check_given(given: Mapping[str, Any], others: Iterable[str] = ()) -> None:
    """Refuse settings that a user cannot have, before any work.

    Args:
        given: keywords for transformers' `generate`.
        others: names of further options that the user may have meant.

    Raises:
        OptionError: names the setting and the reason.
    """
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    for name, value in given.items():
        if name == "max_length":
            raise OptionError(f"max_length={value!r} would count the prompt; give max_new_tokens")
        if name in _NOT_HELD:
            held, why = _NOT_HELD[name]
            if value is not None and value != held:
                reason = re.sub(r"[{}]", "", why)
                raise OptionError(f"{name}={value!r} is not served ({reason}); leave it out")
        elif name in SETTINGS and not _is_right(name, value):
            raise OptionError(f"{name} must be {SETTINGS[name][1]}, not {value!r}")
        elif name not in known and name not in _PASSED_ON:
            raise OptionError(_unknown(name, {*known.difference(_NOT_HELD), *others}))
    tokens = given.get("max_new_tokens", 1)
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise OptionError(f"max_new_tokens must be a positive integer, not {tokens!r}")
    check_sampling(given)


def _is_right(name: str, value: Any) -> bool:
    """Whether a setting's value is of its kind; transformers also takes tensors."""
    if hasattr(value, "tolist"):
        return True
    listed = list(value) if isinstance(value, tuple | set | frozenset) else value
    return SETTINGS[name][0](listed)


def _unknown(name: str, known: set[str]) -> str:
    """Return what is said of an option that is none, with what may have been meant."""
    takes = "it takes those of attach, and the fields of transformers' GenerationConfig"
    told = _ELSEWHERE.get(name) or did_you_mean(name, known) or takes
    return f"generate has no option {name!r}: {told}"


def settle(given: Mapping[str, Any], own: Any, prompt_tokens: int) -> Settings:
    """Return the settings of an answer.

    Args:
        given: what the user set, as keywords for transformers' `generate`; not None.
        own: the model's `GenerationConfig`.
        prompt_tokens: of the prompt.
    """
    given = with_sampling_on(given)
    instead: dict[str, Any] = {}
    told: list[str] = []

    def leave_out(name: str, value: Any, why: str) -> None:
        instead[name] = value
        told.append(f"{name}={getattr(own, name)!r} ({why})")

    def asked(name: str) -> Any:
        return given.get(name, getattr(own, name, None))

    for name, (value, why) in _NOT_HELD.items():
        wanted = getattr(own, name, None)
        if wanted is None or wanted == value:
            continue
        if wanted in _USUAL_CACHES:
            instead[name] = value
        else:
            leave_out(name, value, why)
    rows = asked("num_beams") or 1
    if rows > 1 and "prompt_lookup_num_tokens" in given:
        leave_out("num_beams", 1, "{prompt_lookup_num_tokens} goes without beams")
        rows = 1
    if rows > 1 and getattr(own, "prompt_lookup_num_tokens", None) is not None:
        leave_out("prompt_lookup_num_tokens", None, "beams go without")
    new_tokens = given.get("max_new_tokens", DEFAULT_NEW_TOKENS)
    if "max_new_tokens" not in given:
        why = f"{{max_new_tokens}} is {new_tokens} unless given"
        if getattr(own, "max_new_tokens", None) not in (None, new_tokens):
            told.append(f"max_new_tokens={own.max_new_tokens} ({why})")
        elif (getattr(own, "max_length", None) or math.inf) < prompt_tokens + new_tokens:
            told.append(f"max_length={own.max_length} ({why})")
    stop_strings = asked("stop_strings") or ()
    end_ids = asked("eos_token_id")
    keywords = instead | dict(given)
    lookup = keywords.get(_LOOKUP, getattr(own, _LOOKUP, None))
    return Settings(
        keywords=keywords | {"max_new_tokens": new_tokens},
        rows=rows,
        max_new_tokens=new_tokens,
        max_time_s=asked("max_time"),
        stop_strings=(stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings),
        end_ids=_ids(end_ids),
        lookup_tokens=lookup,
        lookup_ngram_tokens=asked("max_matching_ngram_size") or 2,
        left_out=tuple(told),
    )


def _ids(given: Any) -> frozenset[int]:
    """Return token ids that are given as one, several, a tensor, or None."""
    if given is None:
        return frozenset()
    listed = given.tolist() if hasattr(given, "tolist") else given
    return frozenset(map(int, listed if isinstance(listed, (list, tuple)) else [listed]))
