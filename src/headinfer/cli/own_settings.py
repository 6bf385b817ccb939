"""What a model's own generation config asks for, beside what the user asked for.

Settings that transformers honours with our cache and a streamer hold as they are. The rest do not
hold here, and the user is told.
"""

import math
from dataclasses import dataclass
from typing import Any

from headinfer.cli.sampling import DEFAULT_NEW_TOKENS, GenerationOptions

_ONE_ANSWER = "one answer is written"
_TEXT_ONLY = "only text is written"
_NOT_OURS = "transformers has it in repositories of their own"
_NO_DRAFTS = "nothing is drafted but by --prompt-lookup"

_NOT_HELD: dict[str, tuple[Any, str]] = {
    "num_return_sequences": (1, _ONE_ANSWER),
    "use_cache": (True, "HeadInfer is the cache"),
    "cache_implementation": (None, "HeadInfer is the cache"),
    "prefill_chunk_size": (None, "--chunk-tokens does it"),
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
"""Fields of a generation config, the value that holds here instead, and why."""

_USUAL_CACHES = ("dynamic", "hybrid")
"""Stock caches that many checkpoints name, and that change no result: nothing to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of one answer: the user's, then the model's own.

    Attributes:
        keywords: for `generate`.
        rows: of the cache.
        max_new_tokens: the most tokens to generate.
        max_time_s: after which `generate` stops, if at all.
        stop_strings: which end the answer.
        note: what the user should know, if anything.
    """

    keywords: dict[str, Any]
    rows: int
    max_new_tokens: int
    max_time_s: float | None
    stop_strings: tuple[str, ...]
    note: str | None


def settle(options: GenerationOptions, own: Any, prompt_tokens: int) -> Settings:
    """Return the settings of an answer.

    Args:
        options: what the user set.
        own: the model's `GenerationConfig`.
        prompt_tokens: of the prompt.
    """
    instead: dict[str, Any] = {}
    told: list[str] = []

    def leave_out(name: str, value: Any, why: str) -> None:
        instead[name] = value
        told.append(f"{name}={getattr(own, name)!r} ({why})")

    for name, (value, why) in _NOT_HELD.items():
        asked = getattr(own, name, None)
        if asked is None or asked == value:
            continue
        if asked in _USUAL_CACHES:
            instead[name] = value
        else:
            leave_out(name, value, why)
    rows = options.num_beams or getattr(own, "num_beams", None) or 1
    if rows > 1 and options.prompt_lookup_num_tokens is not None:
        leave_out("num_beams", 1, "--prompt-lookup goes without beams")
        rows = 1
    if rows > 1 and getattr(own, "prompt_lookup_num_tokens", None) is not None:
        leave_out("prompt_lookup_num_tokens", None, "beams go without")
    new_tokens = options.max_new_tokens or DEFAULT_NEW_TOKENS
    if options.max_new_tokens is None:
        why = f"--max-new-tokens is {new_tokens} unless given"
        if getattr(own, "max_new_tokens", None) not in (None, new_tokens):
            told.append(f"max_new_tokens={own.max_new_tokens} ({why})")
        elif (getattr(own, "max_length", None) or math.inf) < prompt_tokens + new_tokens:
            told.append(f"max_length={own.max_length} ({why})")
    stop_strings = getattr(own, "stop_strings", None) or ()
    note = f"of the model's own generation settings these do not hold here: {', '.join(told)}"
    return Settings(
        keywords=instead | options.keywords() | {"max_new_tokens": new_tokens},
        rows=rows,
        max_new_tokens=new_tokens,
        max_time_s=getattr(own, "max_time", None),
        stop_strings=(stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings),
        note=note if told else None,
    )
