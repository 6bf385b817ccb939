"""The loop of a conversation: a line, what comes of it, and the next one, until the user leaves."""

import typer
from rich.console import Console

from headinfer.cli.console import report
from headinfer.cli.interrupt import Stopped
from headinfer.cli.talk.commands import MARK, Commands, Leave
from headinfer.cli.talk.conversation import Conversation
from headinfer.cli.talk.lines import Lines
from headinfer.errors import HeadInferError

_LEAVING = "Ctrl-D or /exit leaves"


def converse(conversation: Conversation, commands: Commands, lines: Lines, console: Console) -> int:
    """Converse until the user leaves.

    What goes wrong with a line is told in one line, and the conversation goes on.

    Args:
        conversation: to go on with.
        commands: of it.
        lines: of the user.
        console: on stderr.

    Returns:
        The exit code: without somebody at a terminal the highest of an error, else 0.

    Raises:
        Stopped: a signal asked for the end of the process.
        typer.Exit: nobody reads the answers.
    """
    code = 0
    while True:
        try:
            line = lines.read()
        except EOFError:
            break
        except KeyboardInterrupt as error:
            _let_end(error, lines)
            console.print(_LEAVING)
            continue
        except HeadInferError as error:
            code = max(code, report(error))
            continue
        try:
            stopped = _heed(line, conversation, commands)
            if stopped is not None:
                _let_end(stopped, lines)
        except Leave:
            break
        except typer.Exit:
            raise
        except (Exception, KeyboardInterrupt) as error:
            if isinstance(error, KeyboardInterrupt):
                _let_end(error, lines)
            code = max(code, report(error))
    return 0 if lines.by_hand else code


def _let_end(error: KeyboardInterrupt, lines: Lines) -> None:
    """Raise what asks for the end of the process: all but Ctrl-C by somebody at a terminal."""
    if not lines.by_hand or (isinstance(error, Stopped) and not error.by_hand):
        raise error


def _heed(line: str, conversation: Conversation, commands: Commands) -> Stopped | None:
    """Do what a line asks for; return the signal that ended an answer early, if one did."""
    text = line.strip()
    if text.startswith(MARK) and not text.startswith(MARK * 2):
        commands.run(text)
        return None
    return conversation.say(text.removeprefix(MARK)) if text else None
