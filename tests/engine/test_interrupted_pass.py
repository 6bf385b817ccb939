"""Ctrl-C before any line of a pass: the cache refuses to go on, or goes on right."""

import gc
import sys
from collections import Counter
from types import CodeType, FrameType
from typing import Any

import pytest

from conversation import Conversation, planned
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.table import Kernels
from headinfer.attend.work import Work
from headinfer.engine import ending
from headinfer.plan.disk_blocks import with_disk
from headinfer.plan.plan import Plan

STRIDE = 8
"""Each eighth line of a pass is interrupted; all of them would take minutes."""

TIMES = 3
"""A line that a pass runs often counts so many times: what is seldom run is interrupted, too."""

TURNS = {"begin", "_pass_by", "_start", "_fetch_ahead", "end", "_advance", "_restart"}
GROWTH = {"reserve", "missing_tokens", "extend_host", "_leave_shared"}
"""Functions in which every line is interrupted."""


class Interrupt:
    """A trace function that raises KeyboardInterrupt before one line of the engine.

    Args:
        line: how many lines are run before, and one.
        functions: whose lines count; None for all of the engine's.
        times: how often a line counts; None for each time it is run.
    """

    def __init__(self, line: int, functions: set[str] | None, times: int | None = TIMES) -> None:
        self.left = line
        self.functions = functions
        self.times = times
        self.runs: Counter[tuple[CodeType, int]] = Counter()

    def __call__(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        file = frame.f_code.co_filename
        ours = "/headinfer/engine/" in file or "/headinfer/kv/" in file
        counts = self.functions is None or frame.f_code.co_name in self.functions
        return self.local if ours and counts else None

    def local(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            line = frame.f_code, frame.f_lineno
            self.runs[line] += 1
            if self.times is not None and self.runs[line] > self.times:
                return self.local
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.local


BLOCKS = {"_add_block", "lower", "reuse", "write"}
READS = {"begin", "end", "copied", "drop", "take"}

PLANS = {
    "cpu": (planned("cpu", 2, 0, 0.0), 120, 20),
    "host": (planned("simulated", 3, 20, 0.4), 0, 2),
    "reserved": (planned("simulated", 2, 0, 0.0), 400, 2),
    "disk": (with_disk(planned("simulated", 1, 0, 0.0), 160 * 1024), 0, 70),
    "resident": (planned("simulated", 2, 100, 0.0), 0, 40),
}
FUNCTIONS = {"any": None, "turns": TURNS, "growth": GROWTH}
BELOW = {"blocks": BLOCKS, "reads": READS}
REST = {("cpu", "any"), ("reserved", "any"), ("resident", "turns"), ("cpu", "growth")}
"""What other pairs show in part."""
LONG = {("disk", "reads"), ("reserved", "turns"), ("host", "turns"), ("host", "any")}


@pytest.mark.covering(most=4)
@pytest.mark.parametrize(
    ("plan", "expected", "new", "functions", "times"),
    [
        pytest.param(
            *(*PLANS[plan], (FUNCTIONS | BELOW)[functions]),
            None if (plan, functions) in LONG else TIMES,
            marks=[pytest.mark.slow] if (plan, functions) in LONG | REST else [],
            id=f"{plan}-{functions}",
        )
        for plan in PLANS
        for functions in (FUNCTIONS if plan != "disk" else BELOW)
    ],
)
def test_an_interrupted_pass_is_refused_or_right(
    plan: Plan, expected: int, new: int, functions: set[str] | None, times: int | None
) -> None:
    gc.collect()  # an engine of another test that dies within a pass would put off the interrupt
    line = 1
    while True:
        chat = Conversation(plan, seed=line)
        chat.engine.expect(75)
        for tokens in (70, 1, 2):
            chat.step(tokens)
        chat.engine.expect(expected)
        chat.engine.settle()  # so that tiles are fetched from the first one on
        before, kv = chat.engine.lengths(), list(chat.kv)
        trace = sys.gettrace()
        sys.settrace(Interrupt(line, functions, times))
        try:
            chat.step(new)
            break
        except KeyboardInterrupt:
            line += STRIDE if functions is None else 1
        finally:
            sys.settrace(trace)
        if not chat.engine.interrupted and chat.engine.lengths() == before:  # or it is refused
            chat.kv = kv
            for tokens in (new, 1, 20):
                chat.step(tokens)
        chat.engine.close()


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    "plan",
    [
        planned("cpu", 2, 0, 0.0, drafts=17),
        planned("simulated", 2, 20, 0.4, 9, drafts=17),
    ],
    ids=["cpu", "windows"],
)
def test_interrupted_drafts_are_forgotten(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_interrupt", lambda: None)  # what was put off is not heard here
    line, left = 1, 0
    while left <= 0:
        chat = Conversation(plan, seed=line)
        for tokens in (70, 1, 2):
            chat.step(tokens)
        before, kv = chat.engine.lengths(), list(chat.kv)
        trace, interrupt = sys.gettrace(), Interrupt(line, None)
        sys.settrace(interrupt)
        try:
            chat.draft(2)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(trace)
        left = interrupt.left
        chat.engine.end_drafts()
        if not chat.engine.interrupted:
            assert chat.engine.lengths() == before
            chat.kv = kv
            chat.draft(2)
            chat.step(2)
            chat.draft(2)
        chat.engine.close()
        line += 2 * STRIDE


class Failing(ReferenceKernel):
    """A kernel that fails once, at a work to come."""

    left = -1

    def attend(self, work: Work) -> None:
        self.left -= 1
        if self.left == 0:
            raise MemoryError("no more")
        super().attend(work)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("layers", "window"), [(3, 0), (2, 13), (4, 13)])
def test_a_layer_that_failed_does_not_spoil_what_comes_next(layers: int, window: int) -> None:
    for failing in range(1, 30, 2):
        kernel = Failing()
        plan = planned("simulated", layers, 0, 0.0, window, drafts=17)
        chat = Conversation(plan, 0, Kernels([kernel]))
        for tokens in (70, 1, 1):
            chat.step(tokens)
        before, kv = [chat.engine.tokens(layer) for layer in range(layers)], list(chat.kv)
        kernel.left = failing
        try:
            chat.step(1)
        except MemoryError:
            for layer in range(layers):
                chat.engine.crop(layer, chat.engine.tokens(layer) - before[layer])
            chat.kv = kv
        kernel.left = -1
        chat.step(1)
        chat.draft(2)
        chat.step(1)
        chat.engine.close()
