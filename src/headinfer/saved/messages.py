"""The messages of a conversation, in a file beside the saved session that has read them."""

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from headinfer.errors import SessionFileError
from headinfer.folders import describe

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

    def as_bytes(self) -> bytes:
        """Return what the file beside a session has; `OffloadedCache.save` writes it."""
        body = {"kind": _KIND, "format": _FORMAT, "system": self.system, "messages": self.said}
        return json.dumps(body, indent=1, ensure_ascii=False).encode()

    @classmethod
    def read(cls, folder: str) -> "Messages":
        """Return the messages that a saved session has; none where it is no conversation's.

        Raises:
            SessionFileError: there is no session; or they cannot be read, are none, or were not
                saved with it.
        """
        # late, so that `--help` answers at once
        from headinfer.saved.folder import messages_path, read_index

        index = read_index(folder)
        path = messages_path(Path(folder), index)
        wrong = f"session {folder!r}: its {path.name}"
        try:
            data = path.read_bytes()
            body = json.loads(data)
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
        if not isinstance(system, str | None) or not are_messages(said):
            raise SessionFileError(f"{wrong} is damaged: it holds no messages")
        if index.messages_crc32 not in (None, zlib.crc32(data)):
            raise SessionFileError(
                f"{wrong} is not the one that was saved with it; remove that file to go on from "
                "the session's tokens alone"
            )
        return cls(system=system, said=said)


def are_messages(given: Any) -> TypeGuard[list[Message]]:
    """Whether users and answers take turns, and nothing is left to be answered.

    Args:
        given: of a file, or of a request.
    """
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
