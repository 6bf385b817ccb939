"""A machine whose host memory is nearly all taken: refused in time, and what is there is used."""

from pathlib import Path

import pytest

import headinfer
from headinfer.device import host_memory
from headinfer.errors import MemoryPlanError
from tiny_models import random_tokens, shared_model


@pytest.fixture
def small_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 400 KiB for KV beside what is kept back where the CPU computes nothing."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 64 kB\nMemAvailable: {128 * 1024 + 401} kB\n")
    monkeypatch.setattr(host_memory, "_PROC", tmp_path)
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)


def test_the_last_of_host_memory_is_kept_back(small_machine: None) -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, chunk_tokens=16) as offload:
        activations = offload.plan.activation_bytes
        assert 0 < activations < 300 * 1024
        fitting = (400 * 1024 - activations - offload.plan.arena_bytes) // 1536
        model(random_tokens(1, fitting - 3), past_key_values=offload.new_cache())
        with pytest.raises(MemoryPlanError, match=r"128.39 MiB are available, less .* activations"):
            model(random_tokens(1, fitting + 3), past_key_values=offload.new_cache())


def test_memory_that_another_cache_will_write_is_not_there(small_machine: None) -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, chunk_tokens=16) as offload:
        tokens = 160 - offload.plan.activation_bytes // 1536  # of 1.5 KiB each: two do not fit
        first, second = offload.new_cache(tokens), offload.new_cache(tokens)
        model(random_tokens(1, 5), past_key_values=first)
        with pytest.raises(MemoryPlanError, match=f"of {tokens} tokens needs .* can be had: "):
            model(random_tokens(1, 5), past_key_values=second)
        first.close()
        model(random_tokens(1, 5), past_key_values=second)


def test_more_host_memory_than_there_is_is_said(
    small_machine: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, host_memory="1TiB") as offload:
        assert "host_memory=1.00 TiB is more than the 399" in caplog.text
        with pytest.raises(MemoryPlanError, match=r"not the 1.00 TiB given as host_memory"):
            model(random_tokens(1, 500), past_key_values=offload.new_cache())
    caplog.clear()
    with headinfer.attach(model, host_memory="200KiB"):
        assert not caplog.text
