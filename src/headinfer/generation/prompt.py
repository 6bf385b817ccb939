"""Prompts in their forms, turned into token ids."""

import bisect
import inspect
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from headinfer.errors import OptionError, is_out_of_memory, reason_of

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""Text as it is, messages for the chat template, or token ids.

Token ids may also be a tensor of one row, or what a tokenizer returns for one text.
"""

_HEEDED = ("add_generation_prompt", "continue_final_message")
"""Arguments of `apply_chat_template` that transformers heeds, whatever the template is."""

_PASSED_ON = ("documents", "tools")
"""Those that it hands to the template; all others are about the result."""

_SYSTEM = "what-the-system-says"
"""A system message no template has, to see whether it writes those it is given."""

_MOST_ENDS = 8
"""Messages whose ends are told, beside the first: each costs a chunk that ends there."""

_SPEAKING = ("system", "developer", "user")
"""Roles whose messages say something. An assistant may call a tool instead."""

_NO_PROMPT = "the prompt must be text, messages (mappings with role and content) or token ids"


class TemplateRefusalError(OptionError):
    """A model's chat template does not take the messages."""


def encode_prompt(
    tokenizer: Any,
    prompt: Prompt,
    template_values: Mapping[str, Any] | None = None,
    check: Callable[[str], object] | None = None,
) -> list[int]:
    """Return a prompt's token ids.

    Args:
        tokenizer: of transformers; adds its special tokens to text, and none to messages.
        prompt: text, messages or token ids.
        template_values: further values for the chat template, by their names in it.
        check: called with the text that is to be tokenised; raises to refuse it.

    Raises:
        OptionError: the prompt is none of these, the chat template refuses messages or values, or
            nothing is left to run the model on.
    """
    check = check or (lambda _text: None)
    parts = None if isinstance(prompt, str) else _parts(prompt)
    if parts and all(isinstance(part, Mapping) for part in parts):
        text = _chat(tokenizer, parts, template_values or {})
        check(text)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    elif template_values:
        raise OptionError("values for the chat template are for messages, which the prompt is not")
    elif isinstance(prompt, str):
        check_text(prompt)
        check(prompt)
        ids = tokenizer(prompt)["input_ids"]
    else:
        ids = _token_ids(parts or [])
    if not ids:
        if parts is not None and not parts:
            raise OptionError("the prompt is an empty list; give text, messages or token ids")
        raise OptionError("the model's tokenizer makes no tokens of this prompt; give some text")
    return [int(token_id) for token_id in ids]


def message_ends(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], template_values: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return how many of a prompt's tokens the first of its messages take, and the newest ones.

    Another prompt with the same messages begins with the same tokens.

    Args:
        tokenizer: of transformers; one that does not tell where its tokens stand gives none.
        messages: that the chat template takes.
        template_values: as for `encode_prompt`.
    """
    if not getattr(tokenizer, "is_fast", False):
        return ()
    text = _fill(tokenizer, list(messages), template_values)
    chars = set()
    for count in sorted({1, *range(max(len(messages) - _MOST_ENDS, 1), len(messages) + 1)}):
        values = {**template_values, "add_generation_prompt": False}
        try:
            first = _fill(tokenizer, list(messages[:count]), values)
        except TemplateRefusalError:  # of messages that end with such a one
            continue
        if text.startswith(first):  # else the template writes later messages into earlier ones
            chars.add(len(first))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in offsets["offset_mapping"]]
    return tuple(sorted({bisect.bisect_right(ends, each) for each in chars} - {0}))


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
    text_or_bytes = isinstance(prompt, str | bytes | bytearray | memoryview)
    if isinstance(prompt, Mapping) or text_or_bytes or not isinstance(prompt, Iterable):
        raise OptionError(_NO_PROMPT)
    return list(prompt)


def _chat(tokenizer: Any, messages: list[Any], values: Mapping[str, Any]) -> str:
    """Return messages as the text a model was trained to answer."""
    if not tokenizer.chat_template:
        raise TemplateRefusalError(
            "the model's tokenizer has no chat template for messages; give the prompt as text"
        )
    for number, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            named = ", ".join(map(repr, message)) or "nothing"
            raise OptionError(
                f"message {number} of the prompt has no role, such as 'user'; it has {named}"
            )
        if message["role"] in _SPEAKING and message.get("content") is None:
            raise OptionError(
                f"message {number} of the prompt, of role {message['role']!r}, has no content; "
                "give it text"
            )
    _check_values(tokenizer, values)
    text = _fill(tokenizer, messages, values)
    marked = [_marked(message) for message in messages]
    if marked != messages and _SYSTEM not in _fill(tokenizer, marked, values):
        raise TemplateRefusalError("the model's chat template leaves out the system message")
    return text


def _marked(message: Any) -> Any:
    """Return a message with the mark in the place of its text, if the system says it."""
    is_system = message.get("role") == "system" and isinstance(message.get("content"), str)
    return {**message, "content": _SYSTEM} if is_system else message


def _fill(tokenizer: Any, messages: list[Any], values: Mapping[str, Any]) -> str:
    keywords = {"add_generation_prompt": True} | dict(values)
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **keywords))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A template is a program: it raises what it likes, and whatever its mistakes lead to.
        raise TemplateRefusalError(
            f"the model's chat template fails ({reason_of(error)})"
        ) from error
    check_text(text)
    return text


def knows_value(tokenizer: Any, name: str) -> bool:
    """Whether a model's chat template names a value, so that setting it may mean something.

    Args:
        tokenizer: of transformers.
        name: of the value, as templates write it.
    """
    template = tokenizer.chat_template or ""
    source = template if isinstance(template, str) else "\n".join(template.values())
    return re.search(rf"\b{re.escape(name)}\b", source) is not None


def _check_values(tokenizer: Any, values: Mapping[str, Any]) -> None:
    """Refuse values for a chat template that it would pass over."""
    arguments = set(inspect.signature(tokenizer.apply_chat_template).parameters)
    taken = {"messages", *arguments}.difference(_PASSED_ON)
    for name in set(values).difference(_HEEDED):
        known = knows_value(tokenizer, name)
        if name == "tools" and not known:
            raise OptionError("the model's chat template takes no tools; leave tools out")
        if name in taken or not known:
            raise OptionError(f"the model's chat template has no value {name!r} to set")


def _token_ids(parts: Sequence[Any]) -> list[int]:
    try:
        return [operator.index(part) for part in parts]
    except TypeError:
        raise OptionError(_NO_PROMPT) from None
