"""A disk below several devices: the same bits as one device in memory alone, and what faults do."""

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from above_disk import FAULTS, TOKENS, Failing, attached, exercise, small_model
from captured import steps
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import CacheStateError, DiskError, MemoryPlanError
from headinfer.integration.memory_held import held_together
from headinfer.plan.below_host import disk_read_bytes
from headinfer.plan.joining import joined
from headinfer.units import parse_bytes
from parted import spread
from tiny_models import random_tokens, tiny_model

MEMORY = "760KiB"
"""Each device has 128 KiB for what is read. A block of 64 tokens takes 48 KiB in three layers."""


WINDOWED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return small_model(3)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("layers", "memory", "options"),
    [
        ((0, 1, 1), MEMORY, {}),
        pytest.param(
            *((0, 1, 1), "720KiB", {"overlap": False, "resident_tokens": 64}),
            marks=pytest.mark.slow,
        ),
        ((1, 0, 2, 0), "1040KiB", {"chunk_tokens": 77}),
    ],
    ids=["two", "in-turn-with-residents", "three-in-another-order"],
)
def test_the_same_bits_as_one_device_in_memory(
    tmp_path: Path, layers: tuple[int, ...], memory: str, options: dict[str, Any]
) -> None:
    model = small_model(len(layers))
    wanted = exercise(model, None, SimulatedDevice(), **options, host_memory=None)
    assert wanted.isfinite().all()
    ours = exercise(model, tmp_path, spread(*layers, seed=1), **options, host_memory=memory)
    assert torch.equal(ours, wanted)
    assert not os.listdir(tmp_path)  # the file has no name


@pytest.mark.parametrize("form", ["packed", pytest.param("int8", marks=pytest.mark.slow)])
def test_packed_tokens_and_drafts_have_the_same_bits(tmp_path: Path, form: str) -> None:
    model, ids, found = small_model(3).bfloat16(), random_tokens(1, TOKENS), []
    drafts = 96 if form == "packed" else 0
    for folder, devices in ((None, SimulatedDevice()), (tmp_path, spread(0, 0, 1, seed=4))):
        options = {"kv_cache": form, "draft_tokens": drafts, "capture": False}
        outputs = []
        with attached(model, folder, "512KiB", devices, **options) as offload:
            cache = offload.new_cache(TOKENS + 100)
            outputs.append(model(ids, past_key_values=cache, logits_to_keep=2).logits)
            for at in range(4):
                if drafts:
                    with cache.drafting():
                        outputs.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
                with cache.verifying():
                    outputs.append(model(ids[:, 7 : 7 + 9], past_key_values=cache).logits)
                cache.crop(-(at % 7) - 1)
            assert (offload.stats.bytes_from_disk > 0) is (folder is not None)
            if folder is not None:
                assert held_together([cache]) <= 512 * 1024
        found.append(torch.cat([each.flatten() for each in outputs]))
    assert torch.equal(*found)


def test_memory_is_divided_so_that_layers_keep_as_many_tokens(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    with attached(model, tmp_path, MEMORY, spread(0, 1, 1), capture=False) as offload:
        cache = offload.new_cache(TOKENS + 2)
        model(random_tokens(1, TOKENS), past_key_values=cache)
        plan, engine = cache.state.engine.plan, cache.state.engine
        first, second = plan.parts
        assert first.disk_host_blocks == second.disk_host_blocks == 8
        assert plan.disk_bytes(TOKENS) == first.disk_bytes(TOKENS) + second.disk_bytes(TOKENS)
        assert second.disk_bytes(TOKENS) == 2 * first.disk_bytes(TOKENS) > 0
        assert plan.kv_host_bytes(TOKENS) == engine.host_kv_bytes <= parse_bytes(MEMORY)
        assert "tokens on disk" in str(plan)
        assert offload.stats.bytes_to_disk == plan.disk_bytes(TOKENS)
        for _ in range(2):  # also what the step before has read ahead
            before = offload.stats.bytes_from_disk
            model(random_tokens(1, 1), past_key_values=cache)
            read_bytes = offload.stats.bytes_from_disk - before
            assert read_bytes == disk_read_bytes(plan, TOKENS) == plan.disk_bytes(TOKENS)


def test_too_little_memory_is_told_for_all_devices_together(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    with (
        attached(model, tmp_path, "350KiB", spread(0, 1, 1)) as offload,
        pytest.raises(MemoryPlanError, match=r"needs 352.00 KiB of CPU memory .* 350.00 KiB can"),
    ):
        model(random_tokens(1, 9), past_key_values=offload.new_cache())


def test_two_caches_share_one_budget(model: PreTrainedModel, tmp_path: Path) -> None:
    prompt, wanted = random_tokens(1, 900), []
    with attached(model, None) as offload:
        cache = offload.new_cache(900)
        for first, end in ((0, 100), (100, 250), (250, 900)):
            wanted.append(model(prompt[:, first:end], past_key_values=cache).logits)
    with attached(model, tmp_path, "900KiB", spread(0, 1, 1)) as offload:
        cache, other = offload.new_cache(900), offload.new_cache(900)
        ours = [model(prompt[:, :100], past_key_values=cache).logits]
        model(prompt, past_key_values=other)  # has all the memory that is left
        for first, end in ((100, 250), (250, 900)):
            ours.append(model(prompt[:, first:end], past_key_values=cache).logits)
            assert held_together([cache, other]) <= 900 * 1024
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


@pytest.mark.covering(most=1)
@FAULTS
def test_a_fault_on_any_device_ends_the_call_and_no_token_is_wrong(
    model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    told: str,
) -> None:
    prompt, devices = random_tokens(1, TOKENS), spread(0, 1, 1)
    with attached(model, tmp_path, "400KiB", devices) as offload:
        cache = offload.new_cache(TOKENS)
        wanted = model(prompt, past_key_values=cache, logits_to_keep=1).logits
        for well in (0, 1, 4, 8):
            cache.reset()
            with monkeypatch.context() as faulty:
                fails = Failing(getattr(os, call), OSError(number, os.strerror(number)), well)
                faulty.setattr(os, call, fails)
                with pytest.raises(DiskError, match=told):
                    model(prompt, past_key_values=cache)
            held = cache.get_seq_length()  # of the chunks before
            assert held < TOKENS
            assert set(cache.state.engine.lengths()) == {held}
            rest = model(prompt[:, held:], past_key_values=cache, logits_to_keep=1).logits
            assert torch.equal(rest, wanted)
        cache.close()
    for device in devices:
        device.memory.check()


def test_a_file_cut_short_is_one_error_in_a_step(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_tokens(1, TOKENS)
    with attached(model, tmp_path, "400KiB", spread(0, 1, 1)) as offload:
        cache = offload.new_cache(TOKENS + 9)
        model(prompt, past_key_values=cache)
        wanted = model(prompt[:, :1], past_key_values=cache).logits
        cache.crop(-1)
        model(prompt[:, :1], past_key_values=cache)
        with monkeypatch.context() as short:
            short.setattr(os, "preadv", lambda *_: 0)
            with pytest.raises(DiskError, match="gave fewer bytes than were written"):
                model(prompt[:, 1:10], past_key_values=cache)
        assert cache.get_seq_length() == TOKENS + 1
        cache.crop(-1)
        assert torch.equal(model(prompt[:, :1], past_key_values=cache).logits, wanted)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("well", [0, 2, 5])
def test_a_full_disk_as_plans_change_leaves_the_plans_before(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, well: int
) -> None:
    prompt = random_tokens(1, TOKENS)
    with attached(model, None) as offload:
        cache = offload.new_cache(TOKENS)
        model(prompt[:, :600], past_key_values=cache)
        wanted = model(prompt[:, 600:], past_key_values=cache, logits_to_keep=1).logits
    devices = spread(0, 1, 1)
    with attached(model, tmp_path, "1MiB", devices, resident_tokens=0) as offload:
        cache = offload.new_cache(TOKENS)
        model(prompt[:, :600], past_key_values=cache)
        engine = cache.state.engine
        shorter = [replace(own, disk_host_blocks=2, chunk_tokens=30) for own in engine.plan.parts]
        with monkeypatch.context() as faulty:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            faulty.setattr(os, "pwritev", Failing(os.pwritev, full, well))
            with pytest.raises(DiskError, match="has no room"):
                engine.replan(joined(engine.plan.shape, shorter))
        changed = [own.chunk_tokens for own in engine.plan.parts]
        assert changed == [30 if well == 5 else 90, 90]
        ours = model(prompt[:, 600:], past_key_values=cache, logits_to_keep=1).logits
        torch.testing.assert_close(ours, wanted)  # a page was sent home: other tiles
    for device in devices:
        device.memory.check()


def test_with_windows_it_refuses_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma3", num_hidden_layers=4, layer_types=WINDOWED).eval()
    prompt = random_tokens(1, TOKENS)
    with attached(model, tmp_path, "340KiB", spread(0, 0, 1, 1)) as offload:
        cache = offload.new_cache(TOKENS)
        with monkeypatch.context() as faulty:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            faulty.setattr(os, "pwritev", Failing(os.pwritev, full, 3))
            with pytest.raises(DiskError, match="has no room"):
                model(prompt, past_key_values=cache)
        with pytest.raises(CacheStateError, match=r"interrupted.*reset"):
            model(prompt[:, :3], past_key_values=cache)
        cache.reset()
        assert model(prompt[:, :3], past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize(("second", "reads"), [("600KiB", True), ("800KiB", False)])
def test_steps_are_captured_unless_any_device_reads_the_disk(
    model: PreTrainedModel, tmp_path: Path, second: str, reads: bool
) -> None:
    """The first device keeps all tokens itself, and the second those on the disk, or fewer."""
    budgets = {"resident_tokens": "auto", "device_memory": ["64MiB", second]}
    with attached(model, tmp_path, "700KiB", spread(0, 1, 1), **budgets) as offload:
        cache = offload.new_cache(TOKENS + 20)
        model(random_tokens(1, TOKENS), past_key_values=cache)
        assert cache.state.engine.plan.disk_tokens(TOKENS) > 0
        steps(model, cache, 6)
        assert (offload.stats.bytes_from_disk > 0) is reads
        assert (offload.stats.captured_steps == 0) is reads
