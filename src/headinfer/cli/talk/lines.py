"""Where a user's lines come from: a pipe, or a terminal with history and several lines."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

from headinfer.cli.talk.commands import COMMANDS, MARK
from headinfer.errors import OptionError
from headinfer.folders import describe, state_folder

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

_HISTORY_NAME = "chat-history"
_LONGEST_KEPT = 10_000
"""Characters of an input that the history keeps: a book that was pasted is none to recall."""


class Lines(Protocol):
    """A source of what a user writes, message by message.

    Attributes:
        by_hand: whether somebody sits at a terminal, and sees what is said.
    """

    by_hand: bool

    def read(self) -> str:
        """Return the next message, or raise `EOFError` where there is none.

        Raises:
            EOFError: the user left.
            KeyboardInterrupt: the user wants none of what is being written.
            OptionError: what was written is no text.
        """


class PipedLines:
    """A source of lines of stdin, each of them a message."""

    by_hand = False

    def read(self) -> str:
        """Return the next line; see `Lines`."""
        data = sys.stdin.buffer.readline()
        if not data:
            raise EOFError
        try:
            return data.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise OptionError(
                f"a line of stdin is not UTF-8 text: byte 0x{data[error.start]:02x} at offset "
                f"{error.start}; convert it first"
            ) from error


class TerminalLines:
    """A source of lines edited in a terminal, with those of earlier runs behind the arrow keys.

    Args:
        console: on stderr.
    """

    by_hand = True

    def __init__(self, console: Console) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.output import create_output

        # stdout has the answers alone, unless stderr goes elsewhere.
        shown = sys.stderr if sys.stderr is not None and sys.stderr.isatty() else sys.stdout
        self._session: PromptSession[str] = PromptSession(
            output=create_output(shown),
            history=_history(console),
            key_bindings=_bindings(),
            completer=_completer(),
            complete_while_typing=False,
            multiline=True,
            prompt_continuation=lambda width, *_: ". ".rjust(width),
        )

    def read(self) -> str:
        """Return what the user writes next; see `Lines`."""
        return self._session.prompt("> ")


def open_lines(console: Console) -> Lines:
    """Return the lines of stdin.

    Raises:
        OptionError: there is no stdin, or a terminal and no prompt_toolkit.
    """
    if sys.stdin is None:
        raise OptionError("stdin is closed; give messages there, one a line")
    seen = any(stream is not None and stream.isatty() for stream in (sys.stderr, sys.stdout))
    if not sys.stdin.isatty() or not seen:
        return PipedLines()
    try:
        return TerminalLines(console)
    except ModuleNotFoundError as error:
        raise OptionError(
            f"in a terminal this needs {error.name}; install it with pip install "
            "'headinfer[chat]', or pipe messages to stdin, one a line"
        ) from error


def _bindings() -> "KeyBindings":
    """Return keys: Enter sends, Alt-Enter or a backslash before Enter begins a further line."""
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter", filter=has_focus(DEFAULT_BUFFER))
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _further_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _history(console: Console) -> "History":
    """Return the history of inputs, which is kept between runs where that can be."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class KeptHistory(FileHistory):
        """A history whose file may fail: that costs the history, and no message."""

        def load_history_strings(self) -> Iterable[str]:
            return _unless_unreadable(super().load_history_strings)

        def store_string(self, string: str) -> None:
            if len(string) > _LONGEST_KEPT:
                return
            try:
                super().store_string(string)
            except OSError:
                return

    try:
        return KeptHistory(_private_file(state_folder() / _HISTORY_NAME))
    except OSError as error:
        console.print(f"note: inputs are not kept: {describe(error)}", markup=False)
        return InMemoryHistory()


def _private_file(path: Path) -> str:
    """Return the path of a file that is there, and that only this user reads."""
    opened = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        if sys.platform != "win32":
            os.fchmod(opened, 0o600)  # it may be of an earlier version
    finally:
        os.close(opened)
    return str(path)


def _unless_unreadable(load: Callable[[], Iterable[str]]) -> Iterator[str]:
    try:
        yield from load()
    except OSError:
        return


def _completer() -> "Completer":
    """Return what Tab completes: names of commands, and paths behind those that take one."""
    from prompt_toolkit.completion import (
        CompleteEvent,
        Completer,
        Completion,
        PathCompleter,
    )
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        """A completer of one line that begins with the mark of commands."""

        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterator[Completion]:
            text = document.text_before_cursor
            name, space, path = text.partition(" ")
            if not space:
                known = (f"{MARK}{each}" for each in COMMANDS if text.startswith(MARK))
                yield from (
                    Completion(f"{each} ", start_position=-len(text), display=each)
                    for each in known
                    if each.startswith(text)
                )
            elif (command := COMMANDS.get(name.removeprefix(MARK))) and command.of_path:
                yield from paths.get_completions(Document(path), complete_event)

    return Commands()
