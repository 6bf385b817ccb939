"""The script that tells why GPUs stand idle in a prefill, on simulated devices."""

import runpy
import sys
from pathlib import Path

import pytest

from headinfer.engine.busy import BusyTimes
from headinfer.kv.place import Coming

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_prefill_trace.py"
TINY = "--device simulated --layers 2 --hidden-size 1024 --context 64 --chunk-tokens 16"


def test_each_chunk_has_a_line_for_each_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = BusyTimes.begin, BusyTimes.pause, Coming.take
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY.split(), "--dtype", "float32"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.startswith("chunk GPU")
    parts = [line.split() for line in lines if line[:5].strip().isdigit()]
    assert [part[:2] for part in parts] == [[str(c), str(g)] for c in range(1, 5) for g in range(2)]
    launched = [float(at) for part in parts for at in (part[2], part[4])]
    assert launched == sorted(launched)
    assert (BusyTimes.begin, BusyTimes.pause, Coming.take) == before
