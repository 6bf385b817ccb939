"""How a trace sorts what torch's profiler saw on a GPU; no GPU is needed for that."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from headinfer import trace
from headinfer.engine.attending import ATTENTION_MARK

COMPUTE, COPY_IN = 7, 13


@dataclass
class Range:
    start: float
    end: float


def event(name: str, start: float, end: float, stream: int | None = None) -> SimpleNamespace:
    """An event of the profiler's: of the CPU, or of one stream."""
    return SimpleNamespace(
        name=name,
        time_range=Range(start, end),
        device_type=SimpleNamespace(name="CPU" if stream is None else "CUDA"),
        device_resource_id=stream,
        cpu_parent=None,
    )


class Profile:
    """Stands for torch's."""

    def __init__(self, **_options: object) -> None:
        self.seen = [
            event("headinfer: clock", 0, 1),
            event(ATTENTION_MARK, 10, 12, COMPUTE),
            # Tiles of layers to come are fetched within the mark, and arrive long after it.
            event(ATTENTION_MARK, 10, 90, COPY_IN),
            event("attend_tile", 10, 12, COMPUTE),
            event("nvjet_sm90_tst_64x8", 20, 30, COMPUTE),
            event("elementwise_kernel", 31, 32, COMPUTE),
            event("Memcpy HtoD (Pinned -> Device)", 11, 90, COPY_IN),
        ]

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def events(self) -> list[SimpleNamespace]:
        return self.seen


def test_only_what_a_mark_spans_on_its_own_stream_is_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "profile", Profile)
    path = tmp_path / "trace.json"
    record = trace.Trace(path, steps=1)
    record.advance()
    record.finish()
    events = json.loads(path.read_text())["traceEvents"]
    slices = {e["name"]: trace.LINES[e["tid"]] for e in events if e["ph"] == "X"}
    assert slices == {
        "attend_tile": "attention",
        "nvjet_sm90_tst_64x8": "projections",
        "elementwise_kernel": "the rest of the model",
        "Memcpy HtoD (Pinned -> Device)": "copy-in",
    }
