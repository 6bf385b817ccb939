"""Fresh processes that take JSON on stdin and give JSON on stdout. Pure Python, never torch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any


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


def ask(
    module: str, question: dict[str, Any], *, time_limit_s: float | None = None
) -> dict[str, Any]:
    """Run a module that calls `serve` in a fresh process and return its answer.

    Args:
        module: what to run.
        question: JSON values.
        time_limit_s: the process is killed when it takes longer.

    Raises:
        ChildError: it ended without one.
        TimeoutError: it took too long.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", module],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            check=False,
            timeout=time_limit_s,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"took longer than {time_limit_s} s") from error
    if done.returncode:
        raise ChildError(done.returncode, done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer the question on stdin.

    Whatever a library prints meanwhile goes to stderr: stdout carries the answer alone.
    """
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)
        json.dump(answer(json.load(sys.stdin)), stdout)
