"""Texts of a conversation as a model reads them: with its chat template, or without one."""

from typing import Any

from headinfer.errors import OptionError

_MARK = "\ue000"
"""A character that no prompt has, and that templates which strip white space leave alone."""


def has_chat(tokenizer: Any, *, raw: bool) -> bool:
    """Whether a chat template is put around what is said."""
    return bool(tokenizer.chat_template) and not raw


def first_text(tokenizer: Any, message: str, *, raw: bool) -> str:
    """Return a first message, up to where its answer begins."""
    if not has_chat(tokenizer, raw=raw):
        return message
    before, after = parts_around(tokenizer, raw=raw)
    return f"{before}{message}{after}"


def parts_around(tokenizer: Any, *, raw: bool) -> tuple[str, str]:
    """Return what a chat template puts before a first message, and after it.

    Raises:
        OptionError: the template changes the message itself.
    """
    if not has_chat(tokenizer, raw=raw):
        return "", ""
    before, mark, after = _rendered(tokenizer, _said("user", _MARK)).partition(_MARK)
    if not mark:
        raise OptionError("the model's chat template changes what is said; leave it out with --raw")
    return before, after


def next_text(tokenizer: Any, answer: str, message: str) -> str:
    """Return what follows where an answer begins: that answer, and the next message.

    Args:
        tokenizer: of transformers, with a chat template.
        answer: what is taken for the answer before.
        message: of the user, up to where its answer begins.

    Raises:
        OptionError: the template changes what was said before.
    """
    first = _said("user", _MARK)
    before = _rendered(tokenizer, first)
    whole = _rendered(tokenizer, first, _said("assistant", answer), _said("user", message))
    if not whole.startswith(before):
        raise OptionError(
            "the model's chat template changes earlier turns when a later one comes, so that "
            "nothing can be kept; leave it out with --raw"
        )
    return whole[len(before) :]


def encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    """Return the token ids of a text.

    Args:
        tokenizer: of transformers.
        text: to read.
        special: whether the tokenizer adds its own tokens, as for a text without a template.
    """
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _rendered(tokenizer: Any, *messages: dict[str, str]) -> str:
    text: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True
    )
    return text
