"""Prompts in their forms, turned into token ids."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from headinfer.errors import OptionError, is_out_of_memory, reason_of

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""Text as it is, messages for the chat template, or token ids.

Token ids may also be a tensor of one row, or what a tokenizer returns for one text.
"""

_NO_PROMPT = "the prompt must be text, messages (mappings with role and content) or token ids"


class TemplateRefusalError(OptionError):
    """A model's chat template does not take the messages."""


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Return a prompt's token ids.

    Args:
        tokenizer: of transformers; adds its special tokens to text, and none to messages.
        prompt: text, messages or token ids.

    Raises:
        OptionError: the prompt is none of these, the chat template refuses the messages, or
            nothing is left to run the model on.
    """
    if isinstance(prompt, str):
        check_text(prompt)
        ids = tokenizer(prompt)["input_ids"]
    else:
        parts = _parts(prompt)
        if parts and all(isinstance(part, Mapping) for part in parts):
            ids = tokenizer(_chat(tokenizer, parts), add_special_tokens=False)["input_ids"]
        else:
            ids = _token_ids(parts)
    if not ids:
        raise OptionError("the model's tokenizer makes no tokens of this prompt")
    return [int(token_id) for token_id in ids]


def check_text(text: str) -> None:
    """Refuse text that is none in UTF-8, such as Python makes of arguments in other encodings.

    Raises:
        OptionError: says where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"the prompt is not UTF-8 text: what stands at character {error.start} is "
            f"{text[error.start]!r}; convert it first"
        ) from None


def _parts(prompt: Any) -> list[Any]:
    """Return the messages or token ids that a prompt consists of."""
    if isinstance(prompt, Mapping) and "input_ids" in prompt:  # what a tokenizer returns
        prompt = prompt["input_ids"]
    if hasattr(prompt, "flatten"):
        if prompt.ndim > 1 and prompt.shape[0] != 1:
            raise OptionError(f"the prompt has {prompt.shape[0]} rows; give one row at a time")
        return list(prompt.flatten().tolist())
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise OptionError(_NO_PROMPT)
    return list(prompt)


def _chat(tokenizer: Any, messages: list[Any]) -> str:
    """Return messages as the text a model was trained to answer."""
    if not tokenizer.chat_template:
        raise TemplateRefusalError(
            "the model's tokenizer has no chat template for messages; give the prompt as text"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A template is a program: it raises what it likes, and whatever its mistakes lead to.
        raise TemplateRefusalError(
            f"the model's chat template fails ({reason_of(error)})"
        ) from error
    check_text(str(text))
    return str(text)


def _token_ids(parts: Sequence[Any]) -> list[int]:
    try:
        return [operator.index(part) for part in parts]
    except TypeError:
        raise OptionError(_NO_PROMPT) from None
