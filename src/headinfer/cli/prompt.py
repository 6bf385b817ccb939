"""The prompt: read from options, file or stdin, and held against the model's positions."""

import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headinfer.errors import OptionError
from headinfer.generation.least_tokens import LeastTokens
from headinfer.generation.prompt import TemplateRefusalError, check_text, encode_prompt
from headinfer.units import counted, counted_tokens

STDIN = "-"


def read_prompt(prompt: str | None, prompt_files: Sequence[str]) -> str:
    """Return the prompt: the files' text, a blank line, and the prompt given; or one of them.

    Line ends at the end of each part are left out, but that between two files there is one. Stdin
    is read for the file "-", and when neither is given and stdin is not a terminal.

    Raises:
        OptionError: there is no prompt, it is empty, or it cannot be read as UTF-8.
    """
    if prompt is not None and not prompt.strip():
        raise OptionError("the prompt is empty; give --prompt some text")
    check_text(prompt or "")
    if prompt is None and not prompt_files:
        if sys.stdin is None or sys.stdin.isatty():
            raise OptionError("no prompt; give --prompt or --prompt-file, or pipe text to stdin")
        prompt_files = [STDIN]
    if list(prompt_files).count(STDIN) > 1:
        raise OptionError("--prompt-file - is given twice, but stdin can be read once")
    parts = []
    if prompt_files:
        parts.append(
            "\n".join(
                read_text(path, "prompt file", "--prompt or --prompt-file") for path in prompt_files
            )
        )
    if prompt is not None:
        parts.append(prompt.rstrip("\r\n"))
    return "\n\n".join(parts)


def read_text(path: str, what: str, options: str) -> str:
    """Return a UTF-8 text without the line ends at its end.

    Args:
        path: of its file, or "-" for stdin.
        what: the file, for messages.
        options: what may be given in place of stdin, for messages.

    Raises:
        OptionError: it is empty, a device, or cannot be read as UTF-8.
    """
    name = "stdin" if path == STDIN else f"{what} {path!r}"
    try:
        if path == STDIN:
            data = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                if stat.S_ISCHR(os.fstat(file.fileno()).st_mode) and not file.isatty():
                    raise OptionError(f"{name} is a device, which may never end; give a file")
                data = file.read()
    except OSError as error:
        raise OptionError(f"{name} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(
            f"{name} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}; "
            "convert it first"
        ) from error
    if not text.strip():
        remedy = f"; give {options}" if path == STDIN else ""
        raise OptionError(f"{name} is empty{remedy}")
    return text.rstrip("\r\n")


def encode(
    tokenizer: Any,
    text: str,
    *,
    system: str | None = None,
    template_values: Mapping[str, Any] | None = None,
    raw: bool,
    check: Callable[[str], None] | None = None,
) -> list[int]:
    """Return the prompt's token ids, in the tokenizer's chat template if it has one.

    Args:
        tokenizer: of transformers.
        text: the user's message.
        system: the system's message before it, if any.
        template_values: values for the chat template.
        raw: True to leave the chat template out.
        check: called with the text that is to be tokenised; raises to refuse it.

    Raises:
        OptionError: the template refuses the messages, there is none for what is given, or nothing
            is left to run the model on.
    """
    if raw or not tokenizer.chat_template:
        _check_no_template(raw, {"--system": system, "--chat-template-kwargs": template_values})
        return encode_prompt(tokenizer, text, check=check)
    user = [{"role": "user", "content": text}]
    messages = user if system is None else [{"role": "system", "content": system}, *user]
    try:
        return encode_prompt(tokenizer, messages, template_values, check)
    except TemplateRefusalError as error:
        if system is None or not _is_taken(tokenizer, user, template_values):
            raise OptionError(f"{error}; --raw leaves it out") from error
        raise OptionError(f"{error}; leave out --system, or put it into --prompt") from error


def _check_no_template(raw: bool, given: Mapping[str, object]) -> None:
    """Refuse options that are for a chat template, where there is none."""
    for name, value in given.items():
        if value not in (None, {}):
            why = "--raw leaves out" if raw else "the model's tokenizer does not have"
            raise OptionError(f"{name} is for the chat template, which {why}; leave out {name}")


def _is_taken(
    tokenizer: Any, messages: list[dict[str, str]], values: Mapping[str, Any] | None
) -> bool:
    """Whether a chat template takes messages."""
    try:
        encode_prompt(tokenizer, messages, values)
    except TemplateRefusalError:
        return False
    return True


def check_length(
    prompt_tokens: int, max_new_tokens: int, max_positions: int, *, allow_long: bool
) -> str | None:
    """Compare the prompt with the positions the model was made for.

    Returns:
        A note for the user when only the answer may go beyond them, else None.

    Raises:
        OptionError: the prompt does, and `allow_long` is False.
    """
    if not max_positions or allow_long:
        return None
    if prompt_tokens > max_positions:
        raise _too_long(counted(prompt_tokens, "token"), max_positions)
    if prompt_tokens + max_new_tokens > max_positions:
        return (
            f"prompt and answer may reach {prompt_tokens + max_new_tokens:,} tokens; the model was "
            f"made for {counted_tokens(max_positions, 'position')}"
        )
    return None


def check_text_length(tokenizer: Any, text: str, max_positions: int, *, allow_long: bool) -> None:
    """Refuse a text whose bytes show that it is too long, as tokenising it may take minutes.

    Args:
        tokenizer: of transformers.
        text: one that is not refused may still be too long.
        max_positions: that the model was made for; 0 where it does not say.
        allow_long: whether the text may be longer.

    Raises:
        OptionError: it is too long.
    """
    if not max_positions or allow_long:
        return
    if (least := LeastTokens(tokenizer).of(text)) > max_positions:
        raise _too_long(f"at least {counted(least, 'token')}", max_positions)


def _too_long(tokens: str, max_positions: int) -> OptionError:
    return OptionError(
        f"the prompt has {tokens}, but the model was made for "
        f"{counted_tokens(max_positions, 'position')}; shorten it, or run it all the same with "
        "--allow-long-prompt"
    )
