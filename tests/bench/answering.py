"""A module for `headinfer.bench.child.ask`, which does as it is told."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any


def answer(question: dict[str, Any]) -> dict[str, Any]:
    print("on stdout", flush=True)
    print("on stderr", file=sys.stderr, flush=True)
    what = question["do"]
    if what == "raise":
        raise ValueError("it broke")
    if what == "exit":
        os._exit(7)
    if what == "draw and die":
        from tqdm import tqdm

        list(tqdm([1]))
    if what.endswith("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(60)
    return {
        "process": os.getpid(),
        "question": question,
        "environment": os.environ.get("HEADINFER_TEST"),
    }


def answers(question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for number in range(question["many"]):
        yield {"number": number, "process": os.getpid()}
    if "do" in question:
        yield answer(question)
