"""torch's compiler is imported in the background, where a step will need it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import headinfer
from headinfer.integration import compiler, fusion
from headinfer.integration.capture import CapturedSteps
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


@pytest.mark.slow
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
from headinfer.device import launches as module
launches = module.launches
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
from headinfer.device import launches as module
launches = module.launches
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
from headinfer.device import launches as module
launches = module.launches
compiler._MODULES = ("setting",)
compiler.begin_import().join()
print(sys.getswitchinterval())
"""
    assert run(code) == (0, "0.25\n", "")


HELD = """
import sys, threading, time
sys.path.insert(0, {folder!r})
from headinfer.integration import compiler
from headinfer.device import launches as module
launches = module.launches
compiler._MODULES = ("first", "second")
module._LONGEST_S = 200.0
"""


@pytest.fixture
def two_modules(tmp_path: Path) -> str:
    """Code with two modules to import, the first of which imports another, and says when."""
    (tmp_path / "first.py").write_text("import inner; print('first', flush=True)")
    (tmp_path / "inner.py").write_text("print('inner', flush=True)")
    (tmp_path / "second.py").write_text("print('second', flush=True)")
    return HELD.format(folder=str(tmp_path))


def test_it_is_held_up_while_a_prompt_is_launched(two_modules: str) -> None:
    code = (
        two_modules
        + """
with launches.under_way():
    thread = compiler.begin_import()
    time.sleep(0.5)
    print("launched", flush=True)
thread.join(100.0)  # it goes on at once
print("done", thread.is_alive(), len([each for each in sys.meta_path if "Held" in repr(each)]))
print(type(sys.modules["inner"].__loader__).__mro__[1].__name__, sys.modules["inner"].__file__[-8:])
"""
    )
    wanted = "launched inner first second done False 0 SourceFileLoader inner.py"
    assert run(code)[1].split() == wanted.split()


def test_it_goes_on_beside_steps_and_what_takes_long(two_modules: str) -> None:
    code = (
        two_modules
        + """
module._LONGEST_S = 0.3
compiler.await_import()
print("nothing to wait for", flush=True)
compiler.begin_import()
compiler.await_import()
print("step")
compiler.begin_import.cache_clear()
compiler._MODULES = ("third",)
open(sys.path[0] + "/third.py", "w").write("print('third', flush=True)")
with launches.under_way():
    compiler.begin_import().join()
    print("prompt")
"""
    )
    wanted = ["nothing to wait for", "inner", "first", "second", "step", "third", "prompt"]
    assert run(code)[1].splitlines() == wanted


def test_what_others_import_meanwhile_is_not_held_up(two_modules: str) -> None:
    code = (
        two_modules
        + """
with launches.under_way():
    thread = compiler.begin_import()
    time.sleep(0.2)
    import second
    print("imported", flush=True)
thread.join()
"""
    )
    assert run(code)[1].split() == ["second", "imported", "inner", "first"]


@pytest.mark.slow
def test_what_cannot_be_imported_is_left_to_who_needs_it() -> None:
    code = FAILING + "import torch\nsys.meta_path.insert(0, Missing())" + BEGUN + "thread.join()"
    assert run(code) == (0, "", "")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done, in order: "begun" where the import first was."""
    done: list[str] = []

    def begin() -> None:
        if "begun" not in done:
            done.append("begun")

    for module in (compiler, fusion):
        monkeypatch.setattr(module, "begin_import", begin)
    return done


@pytest.fixture
def fusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have steps fused wherever they are captured, as on CUDA."""
    known = CapturedSteps.__init__
    monkeypatch.setattr(
        CapturedSteps,
        "__init__",
        lambda self, *args, **kwargs: known(self, *args, **{**kwargs, "fused": True}),
    )


def launched(done: list[str], prompts: list[int], **options: Any) -> list[str]:
    """Have a model read prompts, the first of a cache each but for single tokens; note chunks."""
    model = tiny_model("llama3")
    model.lm_head.register_forward_hook(lambda *_: done.append("chunk"))
    with headinfer.attach(model, device="simulated", chunk_tokens=16, **options) as offload:
        assert not done
        for tokens in prompts:
            if tokens > 1:
                cache = offload.new_cache()
            model(random_tokens(1, tokens), past_key_values=cache)
    return done


@pytest.mark.usefixtures("fusing")
def test_it_is_begun_once_the_last_of_several_chunks_is_launched(begun: list[str]) -> None:
    assert launched(begun, [40]) == ["chunk", "chunk", "chunk", "begun"]


@pytest.mark.usefixtures("fusing")
def test_prompts_of_one_chunk_go_without_and_the_first_step_begins_it(begun: list[str]) -> None:
    assert launched(begun, [10, 12, 1]) == ["chunk", "chunk", "begun", "chunk"]


@pytest.mark.usefixtures("fusing")
def test_it_is_begun_earlier_where_chunks_take_long(
    begun: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "_LONG_CHUNK_S", 0.0)
    assert launched(begun, [60])[:3] == ["chunk", "chunk", "begun"]


@pytest.mark.parametrize("fused", [True, False])
def test_it_is_never_begun_where_no_step_is_fused(
    begun: list[str], request: pytest.FixtureRequest, fused: bool
) -> None:
    if fused:
        request.getfixturevalue("fusing")
    assert "begun" not in launched(begun, [40, 1, 1], capture=not fused)
