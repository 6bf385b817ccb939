"""Kernels of the CPU are compiled while a prompt is read, before a decode step asks for them."""

import shutil
import threading

import pytest
import torch

import headinfer
from headinfer.integration.calls import last_logits
from headinfer.native import build
from tiny_models import random_tokens, tiny_model


@pytest.mark.parametrize("kv_cache", [pytest.param("dense", marks=pytest.mark.slow), "packed"])
def test_a_decode_step_waits_for_no_compiler(kv_cache, tmp_path, monkeypatch):
    if build._openmp_library() is None or shutil.which("cc") is None:
        pytest.skip("no kernel can be compiled here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled, run = [], build._run

    def noted(command: list[str], folder) -> None:
        compiled.append(command[-1])
        run(command, folder)

    monkeypatch.setattr(build, "_run", noted)
    monkeypatch.setattr(build, "_FLAGS", ("-O0", *build._FLAGS[1:]))  # compiled in less time
    # A group that no other test has, or its kernels would be there.
    heads = {"dense": 14, "packed": 22}[kv_cache]
    model = tiny_model("qwen3", head_dim=32, num_attention_heads=heads).bfloat16()
    ids = random_tokens(1, 71)
    with (
        torch.no_grad(),
        headinfer.attach(
            model,
            device="simulated",
            resident_tokens=0,
            host_attention=0.5,
            chunk_tokens=70,
            kv_cache=kv_cache,
        ) as offload,
    ):
        cache = offload.new_cache()
        last_logits(model, ids[:, :70], cache)
        for thread in threading.enumerate():
            if thread.name == "headinfer-compiler":
                thread.join()
        before = list(compiled)
        last_logits(model, ids[:, 70:], cache)
    assert compiled == before
