"""Fresh processes that are asked one question and give answers. Pure Python, never torch.

They are forked from a server that has imported torch and transformers and run nothing. Importing
takes up to 15 s: a suite of forty trials would spend ten minutes on it. Where there is no such
server (Windows) each process imports for itself. The environment is the caller's, but for what is
read on import, which is as it was when the server started.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from headinfer.errors import OptionError
from headinfer.folders import describe, temporary_folder
from headinfer.scratch import scratch_folder

Values = dict[str, Any]
"""What goes between processes: names and values of JSON."""

_END_S = 10
"""How long a process that has answered may take to end."""

_END: Values = {}
"""What a child sends after its last answer."""

_PRELOADED = ["headinfer.bench.machine", "headinfer.bench.ranked"]


class ChildError(Exception):
    """A child process ended without an answer.

    Attributes:
        returncode: its exit status; minus the signal that killed it.
        stderr: what it said.
    """

    def __init__(self, returncode: int, stderr: str) -> None:
        super().__init__(f"exit status {returncode}")
        self.returncode = returncode
        self.stderr = stderr


def ask(module: str, question: Values, *, time_limit_s: float | None = None) -> Values:
    """Call a module's `answer` in a fresh process and return what it returns.

    Args:
        module: its name.
        question: what `answer` is given.
        time_limit_s: the process is killed when it takes longer.

    Raises:
        ChildError: it ended without an answer.
        TimeoutError: it took too long.
        OptionError: there is no folder for temporary files that is safe.
    """
    (answer,) = _answers(module, "answer", question, time_limit_s)
    return answer


def ask_for_many(module: str, question: Values) -> Iterator[Values]:
    """Call a module's generator `answers` in a fresh process; yield what it yields, when it does.

    The process is killed where the caller stops earlier.

    Args:
        module: its name.
        question: what `answers` is given.

    Raises:
        ChildError: it ended in another way than by its last answer.
        OptionError: there is no folder for temporary files that is safe.
    """
    yield from _answers(module, "answers", question, None)


def _answers(
    module: str, function: str, question: Values, time_limit_s: float | None
) -> Iterator[Values]:
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    with scratch_folder(_temporary_folder()) as folder, receiver:
        said = folder / "said"
        asked = (module, function, json.dumps(question))
        process = context.Process(
            target=_run, args=(asked, sender, str(said), dict(os.environ)), daemon=True
        )
        try:
            with _without_main():
                process.start()
            sender.close()
            while True:
                if not receiver.poll(time_limit_s):
                    raise TimeoutError(f"took longer than {time_limit_s} s")
                answer: Values = json.loads(receiver.recv_bytes())
                if answer == _END:
                    break
                yield answer
            process.join(_END_S)
        except (EOFError, ConnectionError) as error:
            if process.pid is None:
                raise ChildError(1, f"no process could be started: {error}") from error
            process.join()
            stderr = said.read_text(errors="replace") if said.exists() else ""
            raise ChildError(process.exitcode or 0, stderr) from error
        finally:
            if process.pid is not None and process.is_alive():
                process.kill()
                process.join()


def _temporary_folder() -> Path:
    try:
        return temporary_folder()
    except OSError as error:
        raise OptionError(
            f"trials cannot keep temporary files ({describe(error)}); set TMPDIR to a folder of "
            "yours that can be written to"
        ) from error


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep the child from importing the caller's main program, which it does not need."""
    main: dict[str, Any] = vars(sys.modules["__main__"])
    hidden: tuple[str, ...] = ("__file__", "__spec__")
    kept = {name: main.pop(name) for name in hidden if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.update(kept)


def _start_server() -> None:
    """Start the server where the signals that a terminal sends to all do not reach it.

    Nor what is forked from it: the caller ends that. Both would print a traceback or, of a terminal
    that is closed, end before the caller knows why.
    """
    resource_tracker.ensure_running()  # else the server starts it, and lets signals in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # A driver that an import asks for GPUs in the server would not work in what is forked from it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context.set_forkserver_preload(_PRELOADED)
    _start_server()
    return context


def _have_no_semaphore() -> None:
    """Give tqdm a lock of this process alone, as transformers loads models beside its bars.

    Its own one is a semaphore of the system. A process that is killed leaves that behind, and
    Python warns of it on the caller's stderr.
    """
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())


def _run(
    asked: tuple[str, str, str], sender: Connection, said: str, environment: dict[str, str]
) -> None:
    """Answer in the child; whatever a library prints meanwhile goes to a file."""
    try:
        file = open(said, "wb")  # noqa: SIM115  # of an interrupted caller, the folder is gone
    except FileNotFoundError:
        return
    with file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    _have_no_semaphore()
    module, function, question = asked
    answer: Callable[[Values], Any] = getattr(importlib.import_module(module), function)
    given = answer(json.loads(question))
    for each in [given] if isinstance(given, dict) else given:
        sender.send_bytes(json.dumps(each).encode())
    sender.send_bytes(json.dumps(_END).encode())
    sender.close()
