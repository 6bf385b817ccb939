"""Triton is imported and identified beside the caller, once."""

import subprocess
import sys

import pytest

from headinfer.attend.ahead import begin_preparing

pytest.importorskip("triton")


def run(code: str) -> str:
    """Return what Python code prints."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.slow
def test_triton_is_identified_once_the_thread_has_ended() -> None:
    printed = run("""
import sys
from headinfer.attend.ahead import begin_preparing
missing = "triton" not in sys.modules
begin_preparing().join()
from triton.runtime.cache import triton_key
print(missing, triton_key.cache_info().currsize)
""")
    assert printed == "True 1\n"


def test_it_is_begun_once() -> None:
    assert begin_preparing() is begin_preparing()


@pytest.mark.slow
def test_without_triton_nothing_fails() -> None:
    printed = run("""
import sys
sys.modules["triton"] = None
from headinfer.attend.ahead import begin_preparing
begin_preparing().join()
print("ended")
""")
    assert printed == "ended\n"
