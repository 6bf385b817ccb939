"""torch's compiler is imported in the background, where a step will need it."""

import subprocess
import sys
from pathlib import Path

import pytest

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.stats import Stats
from headinfer.integration import compiler
from headinfer.integration.capture import CapturedSteps
from headinfer.integration.compiler import CompilerImport
from tiny_models import random_tokens, tiny_model

BEGUN = """
import sys, torch
from headinfer.integration.compiler import begin_import
missing = "torch._inductor.compile_fx" not in sys.modules
thread = begin_import()
assert begin_import() is thread
"""
FAILING = """
import importlib, importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch._dynamo":
            raise ValueError("no compiler")
"""


def run(code: str) -> tuple[int, str, str]:
    """Return the exit code of Python code, and what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_the_compiler_is_there_once_the_thread_has_ended() -> None:
    code = BEGUN + "thread.join(); print(missing, 'torch._inductor.compile_fx' in sys.modules)"
    assert run(code) == (0, "True True\n", "")


def test_a_process_that_ends_meanwhile_waits_for_one_module_at_most(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time; time.sleep(2); print('slow')")
    (tmp_path / "unwanted.py").write_text("print('unwanted')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from headinfer.integration import compiler
compiler._MODULES = ("slow", "unwanted")
compiler.begin_import()
"""
    assert run(code) == (0, "slow\n", "")


def test_other_threads_wait_little_for_the_interpreter_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "noting.py").write_text("import sys; print(sys.getswitchinterval() < 1e-3)")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from headinfer.integration import compiler
compiler._MODULES = ("noting",)
before = sys.getswitchinterval()
compiler.begin_import().join()
print(sys.getswitchinterval() == before)
"""
    assert run(code) == (0, "True\nTrue\n", "")


def test_an_interval_that_the_caller_sets_meanwhile_stays(tmp_path: Path) -> None:
    (tmp_path / "setting.py").write_text("import sys; sys.setswitchinterval(0.25)")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from headinfer.integration import compiler
compiler._MODULES = ("setting",)
compiler.begin_import().join()
print(sys.getswitchinterval())
"""
    assert run(code) == (0, "0.25\n", "")


def test_what_cannot_be_imported_is_left_to_who_needs_it() -> None:
    code = FAILING + "import torch\nsys.meta_path.insert(0, Missing())" + BEGUN + "thread.join()"
    assert run(code) == (0, "", "")


@pytest.mark.parametrize(
    ("enabled", "fused"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_it_is_begun_where_captured_steps_are_fused(
    monkeypatch: pytest.MonkeyPatch, enabled: bool, fused: bool
) -> None:
    begun: list[bool] = []
    monkeypatch.setattr(compiler, "begin_import", lambda: begun.append(True))
    steps = CapturedSteps(
        *(tiny_model("llama3"), [SimulatedDevice()], Stats()), enabled=enabled, fused=fused
    )
    assert not begun
    steps.expect_steps()
    assert bool(begun) == (enabled and fused)


@pytest.mark.parametrize("tokens", [10, 40], ids=["one chunk", "several"])
def test_it_is_begun_once_the_last_chunk_is_launched(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    done = chunks_and_import(monkeypatch, tokens)
    assert done == ["chunk"] * (len(done) - 1) + ["begun"]
    assert len(done) == 1 + -(-tokens // 16)


def test_it_is_begun_earlier_where_chunks_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_LONG_CHUNK_S", 0.0)
    assert chunks_and_import(monkeypatch, 60)[:3] == ["chunk", "chunk", "begun"]


def chunks_and_import(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[str]:
    """Return in which order a prompt's chunks were launched, and the import first begun."""
    done: list[str] = []
    begun = CompilerImport()  # as where steps are fused, which they are on CUDA
    monkeypatch.setattr(
        CapturedSteps,
        "expect_steps",
        lambda _, more_chunks=False: begun.chunk_launched(more=more_chunks),
    )
    monkeypatch.setattr(compiler, "begin_import", lambda: "begun" in done or done.append("begun"))
    model = tiny_model("llama3")
    model.lm_head.register_forward_hook(lambda *_: done.append("chunk"))
    with headinfer.attach(model, device="simulated", chunk_tokens=16) as offload:
        assert not done
        model(random_tokens(1, tokens), past_key_values=offload.new_cache())
    return done
