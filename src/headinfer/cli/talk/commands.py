"""What a user can have done in a conversation beside saying something: lines that begin with /."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from headinfer.cli.prompt import read_text
from headinfer.cli.render import print_rows, summary_rows
from headinfer.cli.talk.conversation import Conversation
from headinfer.errors import OptionError
from headinfer.plan.plan import Plan
from headinfer.units import counted

MARK = "/"


class Leave(Exception):
    """The user wants to leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command.

    Attributes:
        value: what comes behind its name, for the help; "" for nothing.
        help: what it does.
        run: does it, given what stands behind its name.
        of_path: whether that is a path.
    """

    value: str
    help: str
    run: Callable[["Commands", str], None]
    of_path: bool = False


class Commands:
    """A set of the commands of one conversation.

    Args:
        conversation: which they change.
        console: on stderr, where all they say goes.
        plan: of the attachment.
    """

    def __init__(self, conversation: Conversation, console: Console, plan: Plan) -> None:
        self._conversation = conversation
        self._console = console
        self._plan = plan

    def run(self, line: str) -> None:
        """Run the command that a line is.

        Raises:
            OptionError: there is no such command, or what it needs is missing.
            HeadInferError: it failed; the conversation goes on.
            Leave: the user wants to leave.
        """
        name, _, rest = line.removeprefix(MARK).partition(" ")
        command, rest = COMMANDS.get(name), rest.strip()
        if command is None:
            raise OptionError(
                f"there is no command /{name}; /help lists them, and a message that begins "
                "with / begins with // here"
            )
        if rest and not command.value:
            raise OptionError(f"/{name} takes nothing, and was given {rest!r}")
        if command.of_path:
            if not rest:
                raise OptionError(f"/{name} needs a path: /{name} {command.value}")
            rest = os.path.expanduser(_unquoted(rest))
        command.run(self, rest)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)

    def file(self, path: str) -> None:
        """Have a file's text come before the next message."""
        text = read_text(path if path != "-" else "./-", "file", "a path")
        self._conversation.files.append((path, text))
        come = "comes" if len(text) == 1 else "come"
        self._say(f"{path}: {counted(len(text), 'character')} {come} before your next message")

    def save(self, path: str) -> None:
        """Save cache and messages."""
        self._conversation.save(path)

    def load(self, path: str) -> None:
        """Go on with what was saved."""
        conversation = self._conversation
        conversation.load(path)
        messages = len(conversation.messages.said)
        told = (
            counted(messages, "message")
            if messages
            else "no messages, so it serves what begins alike"
        )
        self._say(f"session {path}: {counted(conversation.held_tokens, 'token')}, {told}")

    def system(self, text: str) -> None:
        """Show what the system says, or have it say something."""
        if not text:
            self._say(self._conversation.messages.system or "the system says nothing")
            return
        self._conversation.set_system(text)
        self._say("the system says so from the first message on, so all is read again")

    def clear(self, _rest: str) -> None:
        """Forget what was said."""
        self._conversation.clear()
        self._say("a new conversation begins")

    def help(self, _rest: str) -> None:
        """List the commands."""
        for name, command in COMMANDS.items():
            self._say(f"{f'/{name} {command.value}':<16}{command.help}")
        self._say("Alt-Enter, or \\ and Enter, begins a further line.")
        self._say("Ctrl-C stops an answer. Ctrl-D leaves.")

    def stats(self, _rest: str) -> None:
        """Show what is held, and what the last answer took."""
        conversation, last = self._conversation, self._conversation.last
        messages = len(conversation.messages.said)
        tokens = counted(conversation.held_tokens, "token")
        held = f"{counted(messages, 'message')}, {tokens} in the cache"
        print_rows(self._console, [("conversation", held)])
        if last is None:
            return
        read = f"{last.read_tokens:,} of {counted(last.prompt_tokens, 'token')}"
        rows = [
            ("last prompt", f"{read} were read, the cache had {last.kept_tokens:,}"),
            ("last answer", counted(last.new_tokens, "token")),
        ]
        if last.stats.prefill_tokens or last.stats.decode_tokens:
            rows += summary_rows(last.stats, self._plan)
        print_rows(self._console, rows)

    def exit(self, _rest: str) -> None:
        """Leave."""
        raise Leave


def _unquoted(path: str) -> str:
    """Return a path without the quotes that terminals put around one that is dropped on them."""
    quoted = len(path) > 1 and path[0] == path[-1] and path[0] in "'\""
    return path[1:-1] if quoted else path


COMMANDS: dict[str, Command] = {
    "file": Command(
        value="PATH",
        help="Put a file's text before the next message.",
        run=Commands.file,
        of_path=True,
    ),
    "save": Command(
        value="PATH", help="Save the conversation and its cache.", run=Commands.save, of_path=True
    ),
    "load": Command(value="PATH", help="Go on with a saved one.", run=Commands.load, of_path=True),
    "system": Command(
        value="[TEXT]", help="Show or set what the system says.", run=Commands.system
    ),
    "stats": Command(
        value="", help="Show what is held, and what the last answer took.", run=Commands.stats
    ),
    "clear": Command(value="", help="Begin a new conversation.", run=Commands.clear),
    "help": Command(value="", help="List the commands.", run=Commands.help),
    "exit": Command(value="", help="Leave.", run=Commands.exit),
}
"""The commands by their names."""
