"""Fresh processes that are asked one question and give one answer. Pure Python, never torch.

They are forked from a server that has imported torch and transformers and run nothing: importing
takes up to 15 s, of which a suite of forty trials would spend ten minutes. Where there is no such
server (Windows) each process imports for itself.
"""

import importlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Values = dict[str, Any]
"""What goes between processes: names and values of JSON."""

_PRELOADED = ["headinfer.bench.machine", "headinfer.bench.trial"]


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
    """
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder, receiver:
        said = Path(folder) / "said"
        process = context.Process(
            target=_run, args=(module, question, sender, str(said)), daemon=True
        )
        process.start()
        sender.close()
        try:
            if not receiver.poll(time_limit_s):
                raise TimeoutError(f"took longer than {time_limit_s} s")
            answer: Values = receiver.recv()
        except EOFError as error:
            process.join()
            stderr = said.read_text(errors="replace") if said.exists() else ""
            raise ChildError(process.exitcode or 0, stderr) from error
        finally:
            if process.is_alive():
                process.kill()
            process.join()
    return answer


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # A driver that an import asks for GPUs in the server would not work in what is forked from it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _run(module: str, question: Values, sender: Connection, said: str) -> None:
    """Answer in the child; whatever a library prints meanwhile goes to a file."""
    with open(said, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    answer: Callable[[Values], Values] = importlib.import_module(module).answer
    sender.send(answer(question))
    sender.close()
