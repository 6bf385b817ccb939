"""The messages of a conversation: as a model reads them, and in a file beside a saved session."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from headinfer.errors import OptionError, SessionFileError
from headinfer.folders import describe
from headinfer.generation.prompt import TemplateRefusalError, encode_prompt

_KIND, _FORMAT = "headinfer messages", 1
_ROLES = ("user", "assistant")

Message = dict[str, str]
"""A message with `role` and `content`, as chat templates have them."""


@dataclass(slots=True, kw_only=True)
class Messages:
    """A record of what was said.

    Attributes:
        system: what the system says before all else, if anything.
        said: the user's messages and the answers, in turn.
    """

    system: str | None = None
    said: list[Message] = field(default_factory=list)

    def with_next(self, text: str) -> "Messages":
        """Return the messages with one more of the user's."""
        return Messages(system=self.system, said=[*self.said, {"role": "user", "content": text}])

    def answered(self, text: str) -> "Messages":
        """Return the messages with an answer to the last one."""
        answer = {"role": "assistant", "content": text}
        return Messages(system=self.system, said=[*self.said, answer])

    def write(self, folder: str) -> None:
        """Write them beside a saved session, in place of those that are there.

        Raises:
            SessionFileError: they cannot be written; those that were there are whole.
        """
        body = {"kind": _KIND, "format": _FORMAT, "system": self.system, "messages": self.said}
        path = _file(folder)
        new = path.with_name(f"{path.name}.new")
        try:
            with new.open("w", encoding="utf-8") as file:
                json.dump(body, file, indent=1, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
        except OSError as error:
            raise SessionFileError(
                f"the messages of session {folder!r} cannot be saved: {describe(error)}"
            ) from error

    @classmethod
    def read(cls, folder: str) -> "Messages":
        """Return the messages that a saved session has; none where it is no conversation's.

        Raises:
            SessionFileError: they cannot be read, or are none.
        """
        path = _file(folder)
        wrong = f"session {folder!r}: its {path.name}"
        try:
            body = json.loads(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise SessionFileError(f"{wrong} cannot be read: {describe(error)}") from error
        except ValueError as error:
            raise SessionFileError(f"{wrong} is not JSON") from error
        if not isinstance(body, dict) or body.get("kind") != _KIND:
            raise SessionFileError(f"{wrong} is of another program")
        if body.get("format") != _FORMAT:
            raise SessionFileError(
                f"{wrong} has format {body.get('format')!r}, and this version reads {_FORMAT}"
            )
        system, said = body.get("system"), body.get("messages")
        if not isinstance(system, str | None) or not _are_messages(said):
            raise SessionFileError(f"{wrong} is damaged: it holds no messages")
        return cls(system=system, said=said)


def _file(folder: str) -> Path:
    from headinfer.saved.folder import MESSAGES_NAME  # late, so that `--help` answers at once

    return Path(folder) / MESSAGES_NAME


def _are_messages(given: Any) -> TypeGuard[list[Message]]:
    """Whether users and answers take turns, and nothing is left to be answered."""
    return (
        isinstance(given, list)
        and len(given) % len(_ROLES) == 0
        and all(
            isinstance(message, dict)
            and message.keys() == {"role", "content"}
            and message["role"] == _ROLES[place % len(_ROLES)]
            and isinstance(message["content"], str)
            for place, message in enumerate(given)
        )
    )


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
