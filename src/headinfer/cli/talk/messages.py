"""The messages of a conversation, as a model reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

from headinfer.errors import OptionError
from headinfer.generation.prompt import TemplateRefusalError, encode_prompt
from headinfer.saved.messages import Message, Messages


def encode_messages(
    tokenizer: Any, messages: Messages, values: Mapping[str, Any], *, raw: bool
) -> list[int]:
    """Return the token ids of all messages, the last of which is to be answered.

    Args:
        tokenizer: of transformers.
        messages: the last is the user's.
        values: for the chat template.
        raw: whether the template is left out; an answer then goes on with its message, and each
            further message begins a line.

    Raises:
        OptionError: the template refuses them, or there is none for what is given.
    """
    if raw:
        return encode_prompt(tokenizer, _continued(messages.said))
    system = [] if messages.system is None else [{"role": "system", "content": messages.system}]
    return encode_prompt(tokenizer, [*system, *messages.said], values)


def _continued(said: Sequence[Message]) -> str:
    return "".join(
        ("\n" if place and message["role"] == "user" else "") + message["content"]
        for place, message in enumerate(said)
    )


def check_template(tokenizer: Any, system: str | None, values: Mapping[str, Any]) -> None:
    """Refuse to converse where the chat template does not take what the system says, or values.

    Raises:
        OptionError: says what is not taken, and what to do.
    """
    if not tokenizer.chat_template:
        raise OptionError(
            "the model's tokenizer has no chat template, so it was not made to converse; with "
            "--raw it goes on with what you write"
        )
    trial = Messages(system=system).with_next("?")
    try:
        encode_messages(tokenizer, trial, values, raw=False)
    except TemplateRefusalError as error:
        raise OptionError(f"{error}; leave out what the system says") from error
