"""Changes of a cache above a disk: no token lost or doubled, and no more memory than was given."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import headinfer
from above_disk import attached
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import CacheStateError, DiskError, MemoryPlanError
from headinfer.integration import disk_below
from headinfer.integration.memory_held import held_together
from headinfer.kv.disk_place import DiskPlace
from headinfer.units import parse_bytes
from tiny_models import random_tokens

pytestmark = pytest.mark.usefixtures("inference")


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "in-turn"])
def test_tokens_behind_a_crop_survive_another_caches_need(
    model: PreTrainedModel, tmp_path: Path, overlap: bool
) -> None:
    prompt, logits = random_tokens(1, 400), []
    for folder in (None, tmp_path):
        with attached(model, folder, overlap=overlap) as offload:
            cache, other = offload.new_cache(), offload.new_cache()
            model(prompt, past_key_values=cache)
            cache.crop(-390)
            model(prompt[:, :100], past_key_values=other)  # which takes memory of the first
            model(prompt[:, 10:150], past_key_values=cache)
            logits.append(model(prompt[:, 150:200], past_key_values=cache).logits)
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapped", "in-turn"])
def test_rows_of_blocks_that_a_copy_cut(
    model: PreTrainedModel, tmp_path: Path, overlap: bool
) -> None:
    prompt, found = random_tokens(2, 500), []
    for folder in (None, tmp_path):
        with attached(model, folder, "4MiB", overlap=overlap) as offload:
            cache = offload.new_cache()
            model(prompt[:, :300], past_key_values=cache)
            copied = copy.deepcopy(cache)
            model(prompt[:, 300:450], past_key_values=copied)
            copied.reorder_cache(torch.tensor([1, 0]))
            keys = copied.layers[0].keys
            found.append((model(prompt[:, 450:], past_key_values=copied).logits, keys))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_parked_copy_stays_whole_when_it_is_compacted(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    prompt, logits = random_tokens(1, 800), []
    for folder in (None, tmp_path):
        with attached(model, folder, "4MiB") as offload:
            cache = offload.new_cache()
            model(prompt[:, :290], past_key_values=cache)
            copied = copy.deepcopy(cache)
            model(prompt[:, 290:], past_key_values=copied)
            copied.crop(-480)
            copied.park()
            for part in copied.state.engine.parts:
                part.compact()
            logits.append(model(prompt[:, 320:370], past_key_values=copied).logits)
    assert torch.equal(logits[0], logits[1])


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("crops", [(133,), (133, 70, 64), (5, 1), (0,)])
def test_the_same_bits_after_crops_into_the_disk(
    model: PreTrainedModel, tmp_path: Path, crops: tuple[int, ...]
) -> None:
    prompt, logits = random_tokens(1, 700), []
    for folder in (None, tmp_path):
        with attached(model, folder) as offload:
            cache = offload.new_cache()
            model(prompt, past_key_values=cache)
            for tokens in crops:
                cache.crop(tokens - cache.get_seq_length())
                model(prompt[:, :300], past_key_values=cache)
            logits.append(model(prompt[:, :50], past_key_values=cache).logits)
            assert held_together([cache]) <= 400 * 1024 or folder is None
    assert torch.equal(logits[0], logits[1])


def test_a_crop_that_cannot_read_the_disk_keeps_what_is_left(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_tokens(1, 700)
    with attached(model, None) as offload:
        cache = offload.new_cache()
        model(prompt[:, :133], past_key_values=cache)
        wanted = model(prompt[:, 133:], past_key_values=cache).logits
    with attached(model, tmp_path) as offload:
        cache = offload.new_cache()
        model(prompt, past_key_values=cache)
        with monkeypatch.context() as faulty:

            def fail(*_: Any) -> int:
                raise OSError(5, "Input/output error")

            faulty.setattr("os.preadv", fail)
            cache.crop(-567)
        torch.testing.assert_close(model(prompt[:, 133:], past_key_values=cache).logits, wanted)


def test_a_dropped_cache_frees_all_at_once(model: PreTrainedModel, tmp_path: Path) -> None:
    with attached(model, tmp_path) as offload:
        cache = offload.new_cache()
        model(random_tokens(1, 700), past_key_values=cache)
        session = cache.state.host
        assert cache.layers[0].keys is not None  # no write is under way any more
        gc.collect()
        gc.disable()
        try:
            del cache
            assert not list(session._engines)
            assert not session.disk.file.size_bytes
        finally:
            gc.enable()


def test_a_closed_cache_counts_nothing(model: PreTrainedModel, tmp_path: Path) -> None:
    with attached(model, tmp_path) as offload:
        cache = offload.new_cache()
        model(random_tokens(1, 9), past_key_values=cache)
        engine = cache.state.engine
        cache.close()
        assert not engine.host_kv_bytes
        assert not sum(engine.host_pieces().values())


class Peak:
    """A count of the most host memory that a cache held while blocks were taken."""

    def __init__(self, device: SimulatedDevice, caches: list[Any]) -> None:
        self.num_bytes = 0
        real = device.host_empty

        def noted(num_bytes: int) -> torch.Tensor:
            held = sum(each.state.engine.host_kv_bytes for each in caches)
            self.num_bytes = max(self.num_bytes, held + num_bytes)
            return real(num_bytes)

        device.host_empty = noted


def test_more_rows_take_no_more_than_was_given(model: PreTrainedModel, tmp_path: Path) -> None:
    device = SimulatedDevice()
    with attached(model, tmp_path, "700KiB", device) as offload:
        cache = offload.new_cache()
        model(random_tokens(1, 1200), past_key_values=cache)
        peak = Peak(device, [cache])
        cache.batch_repeat_interleave(2)
        block = cache.state.engine.plan.disk_block_tokens * 2 * 512
        assert held_together([cache]) <= 700 * 1024
        assert peak.num_bytes <= 700 * 1024 + block
        assert model(random_tokens(2, 9), past_key_values=cache).logits.isfinite().all()
        assert held_together([cache]) <= 700 * 1024


@pytest.mark.slow
def test_another_plan_takes_no_more_than_was_given(model: PreTrainedModel, tmp_path: Path) -> None:
    prompt, limit_bytes = random_tokens(1, 1000), parse_bytes("820KiB", "memory")
    with attached(model, tmp_path, "820KiB") as offload:
        cache, other = offload.new_cache(), offload.new_cache()
        model(prompt[:, :100], past_key_values=other)
        model(prompt, past_key_values=cache)
        assert held_together([cache, other]) <= limit_bytes
        other.close()
        cache.park()
        for tokens in (9, 700, 700, 700, 700):
            model(prompt[:, :tokens], past_key_values=cache)
            assert held_together([cache]) <= limit_bytes


@pytest.mark.slow
def test_copies_that_part_take_no_more_than_was_given(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    prompt, limit_bytes = random_tokens(1, 1000), parse_bytes("900KiB", "memory")
    with attached(model, tmp_path, "900KiB") as offload:
        cache = offload.new_cache()
        model(prompt, past_key_values=cache)
        caches = [cache, copy.deepcopy(cache), copy.deepcopy(cache)]
        for each in caches * 2:
            model(prompt[:, :700], past_key_values=each)
            assert held_together(caches) <= limit_bytes


def test_an_older_cache_goes_on_beside_a_newer_one(model: PreTrainedModel, tmp_path: Path) -> None:
    prompt, limit_bytes = random_tokens(1, 1200), parse_bytes("600KiB", "memory")
    with attached(model, None) as offload:
        cache = offload.new_cache(900)  # whose tiles then follow from the first token on
        for first, end in ((0, 100), (100, 250), (250, 900)):
            wanted = model(prompt[:, first:end], past_key_values=cache).logits
    with attached(model, tmp_path, "600KiB") as offload:
        cache, other = offload.new_cache(), offload.new_cache()
        model(prompt[:, :100], past_key_values=cache)
        model(prompt[:, :700], past_key_values=other)
        for first, end in ((100, 250), (250, 900)):
            ours = model(prompt[:, first:end], past_key_values=cache).logits
            assert held_together([cache, other]) <= limit_bytes
        model(prompt[:, 700:], past_key_values=other)
        assert held_together([cache, other]) <= limit_bytes
    assert torch.equal(ours, wanted)


class Failing:
    """A way to memory that fails after so many calls."""

    def __init__(self, real: Any, calls: int) -> None:
        self.real, self.left = real, calls

    def __call__(self, num_bytes: int) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise MemoryPlanError("no memory can be locked")
        return self.real(num_bytes)


def test_no_memory_in_the_middle_of_a_call_costs_no_token(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    prompt, device = random_tokens(1, 500), SimulatedDevice()
    with attached(model, None) as offload:
        cache = offload.new_cache()
        wanted = model(prompt, past_key_values=cache, logits_to_keep=1).logits
    for well in range(3):
        with attached(model, tmp_path, "700KiB", device) as offload:
            cache, real = offload.new_cache(), device.host_empty
            model(prompt[:, :100], past_key_values=cache)

            device.host_empty = Failing(real, well)
            with pytest.raises(MemoryPlanError, match="locked"):
                model(prompt[:, 100:], past_key_values=cache)
            device.host_empty = real
            rest = prompt[:, cache.get_seq_length() :]
            ours = model(rest, past_key_values=cache, logits_to_keep=1).logits
            torch.testing.assert_close(ours, wanted)


def test_residents_are_filled_within_the_plan(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, logits = random_tokens(1, 700), []
    for folder in (None, tmp_path):
        with attached(model, folder, resident_tokens=200) as offload:
            cache = offload.new_cache()
            model(prompt[:, :650], past_key_values=cache)
            cache.park()
            monkeypatch.setattr("headinfer.engine.disk_tiles.aligned_empty", None)  # nothing beside
            logits.append(model(prompt[:, 650:], past_key_values=cache).logits)
            monkeypatch.undo()
    torch.testing.assert_close(*logits)


def test_a_full_disk_while_rows_are_chosen_is_one_error(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with attached(model, tmp_path, "900KiB") as offload:
        cache = offload.new_cache()
        model(random_tokens(2, 700), past_key_values=cache)

        def fail(*_: Any) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.pwritev", fail)
        with pytest.raises(DiskError, match="has no room"):
            cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(headinfer.HeadInferError, match=r"interrupted.*reset"):
            model(random_tokens(2, 3), past_key_values=cache)
        monkeypatch.undo()
        cache.reset()
        assert model(random_tokens(2, 3), past_key_values=cache).logits.isfinite().all()


def test_a_crop_that_is_interrupted_is_no_cache_to_go_on_with_and_harms_no_other(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_tokens(1, 700)
    with attached(model, None) as offload:
        wanted = model(prompt, past_key_values=offload.new_cache()).logits
    with attached(model, tmp_path) as offload:
        cache, other = offload.new_cache(), offload.new_cache()
        model(prompt, past_key_values=cache)

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as faulty:
            faulty.setattr(DiskPlace, "bring", interrupted)
            with pytest.raises(KeyboardInterrupt):
                cache.crop(133 - 700)
        with pytest.raises(CacheStateError, match="interrupted"):
            model(prompt[:, :3], past_key_values=cache)
        with pytest.raises(MemoryPlanError):  # whose blocks cannot be lowered
            model(prompt, past_key_values=other)
        cache.close()
        torch.testing.assert_close(model(prompt, past_key_values=other).logits, wanted)


def test_a_new_cache_may_fill_what_others_left_free_in_the_file(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = random_tokens(1, 900)
    with attached(model, tmp_path, "800KiB") as offload:
        first, second = offload.new_cache(900), offload.new_cache(900)
        model(prompt, past_key_values=first)
        model(prompt, past_key_values=second)
        monkeypatch.setattr(disk_below, "free_bytes", lambda _folder: 0)  # the disk is full
        with pytest.raises(MemoryPlanError, match="has room for 0 B"):
            model(prompt, past_key_values=offload.new_cache(900))
        first.close()
        model(prompt, past_key_values=offload.new_cache(900))
