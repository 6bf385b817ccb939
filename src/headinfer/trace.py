"""A trace of decode steps: copies, attention and projections, each on a line of its own.

Written in the Chrome trace format, for https://ui.perfetto.dev or chrome://tracing. torch's
profiler measures; here its events are sorted into few lines, so that one sees at a glance whether
the link or the device waits. It does not see the thread on which the host attends, so the times of
that are taken on their own.
"""

import collections
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from headinfer.device.simulated_stream import COPY_MARK, HOST_CALL_MARK
from headinfer.engine import host_attention
from headinfer.engine.attending import ATTENTION_MARK

LINES = (
    "copy-in",
    "copy-out",
    "attention",
    "host attention",
    "projections",
    "the rest of the model",
)
"""The lines of a trace, from top to bottom."""

_CLOCK_MARK = "headinfer: clock"
"""An event of the profiler whose time is known by our clock too."""

_PRODUCTS = ("aten::linear", "aten::mm", "aten::addmm", "aten::bmm", "aten::matmul")
_PRODUCT_KERNELS = ("gemm", "gemv", "cutlass", "cublas", "splitk", "nvjet")
_US_PER_S = 1e6
_COPIES = {"Memcpy HtoD": "copy-in", "Memcpy DtoH": "copy-out"}


@dataclass(frozen=True, slots=True)
class Slice:
    """A slice of time: its line, its name, and microseconds since the trace began."""

    line: str
    name: str
    start_us: float
    duration_us: float


class Trace:
    """A trace of some decode steps of one generation, written to a file.

    Args:
        path: of the file; its folder must exist.
        steps: decode steps to record.

    Attributes:
        written: whether the file was.
    """

    def __init__(self, path: Path, *, steps: int = 8) -> None:
        self._path = path
        self._left = steps
        self.written = False
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports its start on stderr
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile: Any = profile(activities=activities)
        self._running = False
        self._clock_s = 0.0  # of the mark
        self._host_attended: list[tuple[float, float]] = []

    def advance(self) -> None:
        """Note that a token was generated: the first begins the record, the last ends it."""
        if not self._running and self._left:
            self._profile.start()
            with record_function(_CLOCK_MARK):
                self._clock_s = time.perf_counter()
            host_attention.listeners.append(self._note_host_attention)
            self._running = True
        elif self._running:
            self._left -= 1
            if not self._left:
                self.finish()

    def finish(self) -> None:
        """Write what was recorded, if anything is recorded and not yet written."""
        if not self._running:
            return
        self._running, self._left = False, 0
        host_attention.listeners.remove(self._note_host_attention)
        self._profile.stop()
        events = list(self._profile.events())
        slices = [*_slices(events), *self._host_slices(events)]
        self._path.write_text(json.dumps(_document(slices)), encoding="utf-8")
        self.written = True

    def _note_host_attention(self, start_s: float, end_s: float) -> None:
        self._host_attended.append((start_s, end_s))

    def _host_slices(self, events: list[Any]) -> Iterator[Slice]:
        """Yield when the host attended, by the profiler's clock."""
        zero_us = min(event.time_range.start for event in events if event.name == _CLOCK_MARK)
        for start_s, end_s in self._host_attended:
            start_us = zero_us + (start_s - self._clock_s) * _US_PER_S
            yield Slice("host attention", "host attention", start_us, (end_s - start_s) * _US_PER_S)


def _slices(events: Iterable[Any]) -> Iterator[Slice]:
    """Sort the profiler's events into lines; the device's where there are any."""
    on_host: list[Any] = []
    on_device: list[Any] = []
    for event in events:
        (on_host if event.device_type.name == "CPU" else on_device).append(event)
    for event in on_host:
        yield from _host_slices(event, with_device=bool(on_device))
    # A mark spans, on each stream, all that was enqueued within it: copies ahead of time, too.
    marked: dict[int, list[Any]] = collections.defaultdict(list)
    for event in on_device:
        if event.name == ATTENTION_MARK:
            marked[event.device_resource_id].append(event.time_range)
    for event in on_device:
        if event.name not in (ATTENTION_MARK, _CLOCK_MARK):
            yield _slice(_device_line(event, marked[event.device_resource_id]), event)


def _host_slices(event: Any, *, with_device: bool) -> Iterator[Slice]:
    """Yield what an event of the CPU shows; nothing where there is a device, which shows more."""
    if event.name in (HOST_CALL_MARK, _CLOCK_MARK):
        return
    if event.name.startswith(COPY_MARK):
        stream = event.name.removeprefix(COPY_MARK)
        yield _slice(stream if stream in LINES else "host attention", event)
    elif with_device:
        return
    elif event.name == ATTENTION_MARK:
        yield _slice("attention", event)
    elif event.cpu_parent is None:
        is_product = event.name in _PRODUCTS
        yield _slice("projections" if is_product else "the rest of the model", event)


def _device_line(event: Any, marked: list[Any]) -> str:
    """Return the line of work on the device; attention is what a mark on its stream spans."""
    for name, line in _COPIES.items():
        if event.name.startswith(name):
            return line
    start = event.time_range.start
    if any(attention.start <= start < attention.end for attention in marked):
        return "attention"
    is_product = any(part in event.name.lower() for part in _PRODUCT_KERNELS)
    return "projections" if is_product else "the rest of the model"


def _slice(line: str, event: Any) -> Slice:
    start, end = event.time_range.start, event.time_range.end
    return Slice(line, event.name, start, end - start)


def _document(slices: list[Slice]) -> dict[str, Any]:
    """Return the trace in Chrome's format."""
    names = [
        {"ph": "M", "name": name, "pid": 0, "tid": number, "args": {key: value}}
        for number, line in enumerate(LINES)
        for name, key, value in (
            ("thread_name", "name", line),
            ("thread_sort_index", "sort_index", number),
        )
    ]
    events = [
        {
            "ph": "X",
            "name": piece.name,
            "pid": 0,
            "tid": LINES.index(piece.line),
            "ts": piece.start_us,
            "dur": piece.duration_us,
        }
        for piece in slices
    ]
    return {"displayTimeUnit": "ms", "traceEvents": [*names, *events]}
