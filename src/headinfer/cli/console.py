"""What goes to stderr, and how a failure ends: in one line and an exit code, not in a traceback."""

import contextlib
import errno
import io
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import typer
from rich.console import Console

from headinfer.cli.interrupt import (
    ending_the_process,
    stop_code,
    stop_words,
    stopping_at_once,
)
from headinfer.errors import HeadInferError, OptionError, is_out_of_memory
from headinfer.plan.options import DECLARATIONS
from headinfer.ranks.launched import is_another

EXIT_UNEXPECTED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

_DEBUG_VARIABLE = "HEADINFER_DEBUG"

_WORDS_OF_ENGLISH = ("device", "overlap", "capture", "fuse")
_SERVER = ("session_folder_size", "session_folder", "cache_memory", "max_body")
_OTHERS = (*_SERVER, "new_tokens", "time_limit")
_ALONE = (*DECLARATIONS.keys() - set(_WORDS_OF_ENGLISH), *_OTHERS)
_FIRST = (*_WORDS_OF_ENGLISH, "layers", "heads", "dtype", "repeats", "gpus")

_ARGUMENTS = re.compile(
    rf"(?<![-'`.\w])(?:(?P<alone>{'|'.join(sorted(_ALONE))})(?:_s)?(?![\w'`.]| in )"
    rf"|(?P<first>(?<=^)(?:{'|'.join(_FIRST)})(?= )|(?:device|dtype)(?==)))(?P<equals>=)?"
)
"""Arguments of Python that a verb has as options, where they are no words of English.

A key *in* a model's config is none, and what is in quotes is what the user wrote.
"""

_LONG_WORD = re.compile(r"(\S{100})\S{61,}(\S{40})")
_LONGEST = 900
"""Characters of an error. Longer ones hold a name or a text that is no help to read."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""Errors of writing. Those of stdout, and of files that are open already, name no file."""


def stderr_console(*, quiet: bool = False) -> Console:
    """Return a console on stderr that never breaks lines; a quiet one shows nothing."""
    return Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)


def stdout_console() -> Console:
    """Return a console on stdout that never breaks lines."""
    return Console(highlight=False, soft_wrap=True)


def debug_wanted() -> bool:
    """Whether tracebacks are to be shown.

    Raises:
        OptionError: `HEADINFER_DEBUG` is neither 0 nor 1.
    """
    value = os.environ.get(_DEBUG_VARIABLE, "0")
    if value not in ("0", "1"):
        raise OptionError(f"{_DEBUG_VARIABLE} must be 0 or 1, not {value!r}")
    return value == "1"


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks; its type's name when it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def _shortened(line: str) -> str:
    """Return an error with its long words, and then with itself, cut in the middle."""
    line = _LONG_WORD.sub(r"\1...\2", line)
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} ... {line[-half:]}"


def with_options(message: str) -> str:
    """Return a message with the options of the command line in place of Python's arguments."""
    return _ARGUMENTS.sub(_option, message)


def _option(found: re.Match[str]) -> str:
    name = found["alone"] or found["first"]
    return f"--{name.replace('_', '-')}{' ' if found['equals'] else ''}"


_OTHERS_S = 2.0
"""Seconds that a rank which is not to speak leaves to the one that is, which torchrun then ends."""


def _is_first() -> bool:
    """Whether this process is the one that speaks, before ranks have found each other."""
    if is_another():
        time.sleep(_OTHERS_S)
        return False
    return True


class _Voice:
    """A note of whether this process tells of its end: one of several ranks does."""

    may_speak: Callable[[], bool] = staticmethod(_is_first)


def let_speak(may_speak: Callable[[], bool]) -> None:
    """Have errors printed only where a function says so, which is asked once for each."""
    _Voice.may_speak = staticmethod(may_speak)


def print_error(message: str) -> None:
    """Print one line to stderr in the form all errors have."""
    _print_line(f"headinfer: error: {_shortened(message)}")


def _print_line(line: str) -> None:
    if sys.stderr is None or not _Voice.may_speak():  # closed when the process began, or a rank
        return
    with contextlib.suppress(OSError):  # the terminal may be gone
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def report(error: BaseException) -> int:
    """Print what went wrong as one line and return the exit code that goes with it.

    With `HEADINFER_DEBUG=1` the traceback comes first.
    """
    try:
        debug = debug_wanted()
    except OptionError as bad_variable:
        print_error(one_line(bad_variable))
        return EXIT_BAD_INPUT
    if debug:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        _print_line(f"headinfer: {stop_words(error)}")
        return stop_code(error)
    if isinstance(error, HeadInferError):
        print_error(with_options(one_line(error)))
        return EXIT_BAD_INPUT
    if is_out_of_memory(error):
        print_error(
            f"out of memory ({_first_line(error)}); try a smaller --chunk-tokens or "
            "--device-memory, or a shorter prompt"
        )
        return EXIT_UNEXPECTED
    if isinstance(error, OSError) and error.errno in _NO_ROOM and not error.filename:
        _discard_unwritten()
        print_error(f"the output cannot be written: {error.strerror}; make room or write elsewhere")
        return EXIT_UNEXPECTED
    if isinstance(error, OSError) and error.filename and error.strerror:
        print_error(f"{os.fsdecode(error.filename)!r} cannot be used: {error.strerror}")
        return EXIT_BAD_INPUT
    print_error(
        f"{type(error).__name__}: {one_line(error)} ({_DEBUG_VARIABLE}=1 shows the traceback)"
    )
    return EXIT_UNEXPECTED


class ClosedStdout(io.TextIOBase):
    """A stdout in the place of one that was closed when the process began: it takes nothing.

    Python has None there, and what is printed is lost without a word.
    """

    encoding = "utf-8"

    def write(self, _text: str) -> NoReturn:
        """Fail as writing to a closed file does."""
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    @classmethod
    def install(cls) -> None:
        """Take the place, and the file's number, which the next file to be opened would get."""
        if sys.stdout is None:
            sys.stdout = cls()
            number = os.open(os.devnull, os.O_WRONLY)
            if number > 2:
                os.close(number)


def discard_stdout() -> None:
    """Let what stdout cannot take go nowhere: Python would try again at its end, and complain."""
    if sys.stdout is None:
        return
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _discard_unwritten() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        discard_stdout()


class _Notes(logging.Handler):
    """A handler that shows the library's warnings as notes, in the words of the command line."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line to stderr."""
        with contextlib.suppress(OSError):  # the terminal may be gone
            line = with_options(" ".join(record.getMessage().split()))
            stderr_console().print(f"note: {line}", markup=False)


@contextlib.contextmanager
def _showing_notes(*, quiet: bool) -> Iterator[None]:
    """Show the library's warnings while a verb runs; with `quiet` show none."""
    logger = logging.getLogger("headinfer")
    notes = logging.NullHandler() if quiet else _Notes(logging.WARNING)
    logger.addHandler(notes)
    try:
        yield
    finally:
        logger.removeHandler(notes)


@contextlib.contextmanager
def reporting_errors(*, quiet: bool = False) -> Iterator[None]:
    """End a verb with one line and an exit code, whatever is raised inside or signalled to stop it.

    Args:
        quiet: whether the library's warnings are left out.

    Raises:
        typer.Exit: with the exit code, after any error.
    """
    try:
        debug_wanted()
        with _showing_notes(quiet=quiet), ending_the_process(), stopping_at_once():
            yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:
        raise typer.Exit(report(error)) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(". ")
