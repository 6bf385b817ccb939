"""Tokens on a disk below host memory: the same bits as in memory alone, in all that moves them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import headinfer
from above_disk import FAULTS, MEMORY, TOKENS, Failing, attached, exercise, small_model
from headinfer.device.base import Edge
from headinfer.device.hazards import HazardError
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import DiskError, MemoryPlanError, OptionError
from headinfer.units import parse_bytes
from tiny_models import random_tokens, shared_model


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (1, {}),
        (2, {"host_memory": "800KiB"}),
        (1, {"overlap": False}),
        (1, {"resident_tokens": 64}),
        (1, {"chunk_tokens": 600, "capture": False}),
    ],
    ids=["one", "two-rows", "in-turn", "residents", "chunks-beyond-memory"],
)
def test_the_same_bits_as_in_memory(
    model: PreTrainedModel, tmp_path: Path, rows: int, options: dict[str, Any]
) -> None:
    without = {**options, "host_memory": None}
    wanted = exercise(model, None, SimulatedDevice(), rows, **without)
    assert wanted.isfinite().all()
    ours = exercise(model, tmp_path, SimulatedDevice(seed=1), rows, **options)
    assert torch.equal(ours, wanted)
    assert not os.listdir(tmp_path)  # the file has no name


def forms(form: str, dtype: torch.dtype, folder: Path | None, memory: str) -> torch.Tensor:
    """Return the logits of a prompt, steps, verified tokens and what follows a crop."""
    model, device = small_model().to(dtype), SimulatedDevice(seed=3)
    prompt, outputs = random_tokens(1, TOKENS), []
    with attached(model, folder, memory, device, kv_cache=form) as offload:
        cache = offload.new_cache(TOKENS + 200)

        def step(first: int, end: int) -> None:
            new = prompt[:, first:end]
            outputs.append(model(new, past_key_values=cache, logits_to_keep=2).logits.flatten())

        step(0, TOKENS)
        for at in range(3):
            step(at, at + 1)
        for at in range(8):
            step(9 * at, 9 * at + 9)
        cache.crop(-75)
        step(3, 70)
        cache.crop(133 - cache.get_seq_length())  # into a block on the disk, and into a page
        step(0, 95)
        step(0, 1)
        assert (offload.stats.bytes_from_disk > 0) is (folder is not None)
        if folder is not None:
            assert offload.stats.host_kv_bytes <= parse_bytes(memory, "host_memory")
        outputs.append(cache.layers[1].values.flatten())
        cache.close()
    device.memory.check()
    return torch.cat(outputs)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("form", "dtype", "memory"),
    [
        ("packed", torch.bfloat16, "256KiB"),
        ("int8", torch.float32, "320KiB"),
        ("fp8", torch.bfloat16, "256KiB"),
    ],
)
def test_other_forms_have_the_same_bits_as_in_memory(
    tmp_path: Path, form: str, dtype: torch.dtype, memory: str
) -> None:
    wanted = forms(form, dtype, None, memory)
    assert wanted.isfinite().all()
    assert torch.equal(forms(form, dtype, tmp_path, memory), wanted)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_drafts_are_verified_above_a_disk(tmp_path: Path, form: str) -> None:
    model, ids, found = small_model().bfloat16(), random_tokens(1, TOKENS), []
    for folder in (None, tmp_path):
        device, outputs = SimulatedDevice(seed=4), []
        with attached(
            model, folder, "256KiB", device, kv_cache=form, draft_tokens=96, capture=False
        ) as offload:
            cache = offload.new_cache(TOKENS + 100)
            model(ids, past_key_values=cache, logits_to_keep=1)
            engine = cache.state.engine
            for at in range(8):
                with cache.drafting():
                    for draft in range(3):
                        new = ids[:, at + draft : at + draft + 1]
                        outputs.append(model(new, past_key_values=cache).logits)
                below, before = engine.disk_tokens, offload.stats.bytes_from_disk
                with cache.verifying():
                    outputs.append(model(ids[:, 7 : 7 + 9], past_key_values=cache).logits)
                read = offload.stats.bytes_from_disk - before
                cache.crop(-(at % 7) - 1)  # the rejected ones, which lie above the disk
                assert cache.get_seq_length() > engine.disk_tokens >= below
                assert (read > 0) is (folder is not None)
        device.memory.check()
        found.append(torch.cat([each.flatten() for each in outputs]))
    assert torch.equal(*found)


@pytest.mark.slow
def test_all_seeds_give_the_same_bits(model: PreTrainedModel, tmp_path: Path) -> None:
    wanted = exercise(model, tmp_path, SimulatedDevice(seed=0))
    for seed in range(1, 20):
        assert torch.equal(exercise(model, tmp_path, SimulatedDevice(seed=seed)), wanted)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("options", [{"resident_tokens": 21}, {"host_attention": 0.7}])
def test_odd_residents_and_the_host_agree(
    model: PreTrainedModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    wanted = exercise(model, None, SimulatedDevice())
    ours = exercise(model, tmp_path, SimulatedDevice(seed=3), **options)
    torch.testing.assert_close(ours, wanted)


def test_the_same_as_stock_transformers(model: PreTrainedModel, tmp_path: Path) -> None:
    prompt = random_tokens(2, 333)
    wanted = model.generate(prompt, max_new_tokens=9, do_sample=False, num_beams=2)
    with attached(model, tmp_path, "900KiB") as offload:
        cache = offload.new_cache()
        ours = model.generate(
            prompt, max_new_tokens=9, do_sample=False, num_beams=2, past_key_values=cache
        )
        assert offload.stats.bytes_to_disk > 0
        assert offload.stats.host_kv_bytes <= 900 * 1024
    assert torch.equal(ours, wanted)


def test_a_saved_session_has_the_tokens_on_the_disk(model: PreTrainedModel, tmp_path: Path) -> None:
    prompt, new = random_tokens(1, TOKENS), random_tokens(1, 5)
    with attached(model, tmp_path) as offload:
        cache = offload.new_cache()
        model(prompt, past_key_values=cache)
        cache.save(tmp_path / "saved")
        wanted = model(new, past_key_values=cache).logits
        cache.close()
        loaded = offload.load_cache(tmp_path / "saved")
        assert loaded.state.engine.disk_tokens > 0
        assert torch.equal(model(new, past_key_values=loaded).logits, wanted)


OF_DISK = (Edge.BLOCK_SENT, Edge.BLOCK_READ, Edge.READ_COPIED)


def grow(model: PreTrainedModel, folder: Path, device: SimulatedDevice) -> None:
    """Have blocks go to the disk that were fetched ahead, as pages are sent home before a pass.

    There is so little memory that each is waited for, and its memory serves the next one.
    """
    with attached(model, folder, "200KiB", device) as offload:
        cache = offload.new_cache()
        for tokens in (250, *[9] * 14):
            model(random_tokens(1, tokens), past_key_values=cache)
        assert offload.stats.bytes_to_disk > 0
        cache.close()
    device.memory.check()


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("edge", OF_DISK)
def test_a_missing_wait_is_noticed(model: PreTrainedModel, tmp_path: Path, edge: Edge) -> None:
    go = grow if edge is Edge.BLOCK_READ else exercise
    device = SimulatedDevice(seed=1)
    go(model, tmp_path, device)
    assert edge in device.exercised_edges
    with pytest.raises(HazardError, match="is not ordered after the"):
        go(model, tmp_path, SimulatedDevice(seed=1, skip=[edge]))


@pytest.mark.covering
@pytest.mark.parametrize("form", ["dense", "packed"])
@FAULTS
def test_a_fault_ends_the_call_and_no_token_is_wrong(
    model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    told: str,
    form: str,
) -> None:
    prompt, device = random_tokens(1, TOKENS), SimulatedDevice()
    model = small_model().bfloat16() if form == "packed" else model
    memory = "256KiB" if form == "packed" else MEMORY
    with attached(model, tmp_path, memory, device, kv_cache=form) as offload:
        cache = offload.new_cache(TOKENS)
        wanted = model(prompt, past_key_values=cache, logits_to_keep=1).logits
        for well in (0, 3, 5):
            cache.reset()
            with monkeypatch.context() as faulty:
                fails = Failing(getattr(os, call), OSError(number, os.strerror(number)), well)
                faulty.setattr(os, call, fails)
                with pytest.raises(DiskError, match=told):
                    model(prompt, past_key_values=cache)
            held = cache.get_seq_length()  # of the chunks before
            assert held < TOKENS
            rest = model(prompt[:, held:], past_key_values=cache, logits_to_keep=1).logits
            assert torch.equal(rest, wanted)
        cache.close()
    device.memory.check()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"device": "cpu"}, "is for a GPU's cache"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    model = shared_model("llama3")
    with pytest.raises(OptionError, match=told):
        headinfer.attach(model, **{"device": "simulated", **options}, disk_cache=tmp_path)


def test_too_little_host_memory_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with attached(model, tmp_path, "50KiB") as offload:
        cache = offload.new_cache()
        with pytest.raises(
            MemoryPlanError, match=r"needs .* of CPU memory at least, and 50.00 KiB"
        ):
            model(random_tokens(1, 9), past_key_values=cache)
