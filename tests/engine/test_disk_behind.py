"""Blocks are written to the disk while the model goes on, and nobody meets one half-written."""

import copy
import errno
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from above_disk import MEMORY
from headinfer.device.simulated import SimulatedDevice
from headinfer.disk.file import SpillFile
from headinfer.disk.transfer import Transfer
from headinfer.errors import DiskError
from headinfer.offload import Offload
from headinfer.units import parse_bytes
from slow_disk import LEFT, SlowDisk, in_memory, opened
from tiny_models import random_tokens

pytestmark = pytest.mark.usefixtures("inference")


def test_the_next_layer_is_launched_while_a_block_is_written(
    model: PreTrainedModel, tmp_path: Path, slow: SlowDisk
) -> None:
    prompt, beside = random_tokens(1, 773), []

    def launched(*_: Any) -> None:
        if slow.writes:
            beside.append(slow.under_way)
            slow.release()

    with opened(model, tmp_path, slow) as offload:
        hook = model.model.layers[1].register_forward_pre_hook(launched)
        try:
            cache = offload.new_cache(773)
            ours = model(prompt, past_key_values=cache).logits[:, -1]
        finally:
            hook.remove()
        assert beside[0] > 0
        assert offload.stats.bytes_to_disk > 0
        cache.close()
    torch.testing.assert_close(ours, in_memory(model, prompt))


def test_a_token_is_read_from_the_disk_once_it_was_written(
    model: PreTrainedModel, tmp_path: Path, slow: SlowDisk
) -> None:
    prompt, rest = random_tokens(1, LEFT), random_tokens(1, 5)
    steps, ours = rest.split(1, 1), []
    with opened(model, tmp_path, slow) as offload:
        cache = offload.new_cache(LEFT + len(steps))
        model(prompt, past_key_values=cache)
        for step in steps:
            if step is steps[3]:
                assert slow.under_way
                assert not slow.log
                slow.release()
                for transfer, _ in slow.writes:
                    transfer.settle()
            ours.append(model(step, past_key_values=cache).logits[:, -1])
        cache.close()
    for number, logits in enumerate(ours):
        wanted = in_memory(model, torch.cat([prompt, rest[:, : number + 1]], 1))
        torch.testing.assert_close(logits, wanted)
    kinds = [kind for kind, _, _ in slow.log]
    assert kinds.count("read") > 0
    assert kinds == sorted(kinds, reverse=True)  # all writes come first


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOSPC, "has no room for"), (errno.EIO, "writing to disk_cache .* failed")],
    ids=["full", "broken"],
)
def test_a_write_that_fails_behind_a_call_is_told_to_the_next_ones(
    model: PreTrainedModel, tmp_path: Path, slow: SlowDisk, number: int, told: str
) -> None:
    prompt, step = random_tokens(1, LEFT), random_tokens(1, 1)
    with opened(model, tmp_path, slow) as offload:
        cache = offload.new_cache(LEFT + 1)
        model(prompt, past_key_values=cache)
        slow.fail_all(OSError(number, os.strerror(number)))
        for _ in range(3):  # as long as the disk fails there is no token
            with pytest.raises(DiskError, match=told) as raised:
                model(step, past_key_values=cache)
            assert "\n" not in str(raised.value)
            assert cache.get_seq_length() == LEFT
        slow.error = None
        ours = model(step, past_key_values=cache).logits[:, -1]
        cache.close()
    torch.testing.assert_close(ours, in_memory(model, prompt, step))


def test_what_is_written_takes_no_more_memory_than_planned(
    model: PreTrainedModel, tmp_path: Path, slow: SlowDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, prompt = SimulatedDevice(), random_tokens(1, 1337)
    real, noted, most, live, peak = device.host_empty, SpillFile.write, [0], [0], [0]

    def freed(num_bytes: int) -> None:
        live[0] -= num_bytes

    def counted(num_bytes: int) -> torch.Tensor:
        whole = real(num_bytes + SpillFile.ALIGNMENT)  # which locked memory has by itself
        start = -whole.data_ptr() % SpillFile.ALIGNMENT
        live[0] += num_bytes
        peak[0] = max(peak[0], live[0])
        weakref.finalize(whole.untyped_storage(), freed, num_bytes)
        return whole[start : start + num_bytes]

    def begun(file: SpillFile, offset: int, memory: torch.Tensor) -> Transfer:
        transfer = noted(file, offset, memory)
        most[0] = max(most[0], slow.under_way)
        return transfer

    with opened(model, tmp_path, slow, device=device) as offload:
        monkeypatch.setattr(device, "host_empty", counted)
        monkeypatch.setattr(SpillFile, "write", begun)
        slow.release_when(Transfer, "settle")
        cache = offload.new_cache(1337)
        ours = model(prompt, past_key_values=cache).logits[:, -1]
        plan = cache.state.engine.plan
        assert len(slow.writes) > 3 * plan.disk_staging_bytes // slow.writes[0][1]
        assert 2 * slow.writes[0][1] <= most[0] == plan.disk_staging_bytes
        assert peak[0] <= parse_bytes(MEMORY, "host_memory")
        cache.close()
    torch.testing.assert_close(ours, in_memory(model, prompt))


def _crop(_: Offload, cache: Any, folder: Path) -> Any:
    cache.crop(30 - LEFT)  # into the block that is being written
    return cache


def _reset(_: Offload, cache: Any, folder: Path) -> Any:
    cache.reset()
    return cache


def _fork(_: Offload, cache: Any, folder: Path) -> Any:
    return copy.deepcopy(cache)


def _fork_and_close(_: Offload, cache: Any, folder: Path) -> Any:
    forked = copy.deepcopy(cache)
    cache.close()
    return forked


def _save(offload: Offload, cache: Any, folder: Path) -> Any:
    cache.save(folder / "saved")
    cache.close()
    return offload.load_cache(folder / "saved", max_tokens=LEFT + 217)


def _park(_: Offload, cache: Any, folder: Path) -> Any:
    cache.park()
    return cache


def _another(offload: Offload, cache: Any, folder: Path) -> Any:
    cache.close()
    return offload.new_cache(LEFT + 217)  # which writes to what was freed


@pytest.mark.covering(most=4)
@pytest.mark.parametrize("change", [_crop, _reset, _fork, _fork_and_close, _save, _park, _another])
def test_changes_meet_a_block_that_is_being_written(
    model: PreTrainedModel,
    tmp_path: Path,
    slow: SlowDisk,
    change: Callable[[Offload, Any, Path], Any],
) -> None:
    prompt, rest = random_tokens(1, LEFT), random_tokens(1, 217)
    with opened(model, tmp_path, slow) as offload:
        cache = offload.new_cache(LEFT + 217)
        model(prompt, past_key_values=cache)
        slow.release_when(Transfer, "settle")
        assert slow.under_way
        changed = change(offload, cache, tmp_path)
        kept = prompt[:, : changed.get_seq_length()]
        ours = model(rest, past_key_values=changed).logits[:, -1]
        changed.close()
    torch.testing.assert_close(ours, in_memory(model, torch.cat([kept, rest], 1)))


def test_a_cache_dropped_beside_its_writes_leaves_their_place_until_they_end(
    model: PreTrainedModel, tmp_path: Path, slow: SlowDisk
) -> None:
    with opened(model, tmp_path, slow) as offload:
        cache = offload.new_cache(LEFT)
        model(random_tokens(1, LEFT), past_key_values=cache)
        file = cache.state.host.disk.file
        gc.collect()
        del cache
        num_bytes = slow.under_way
        assert 0 < num_bytes <= file.size_bytes
        assert file.allocate(SpillFile.ALIGNMENT) >= num_bytes
        slow.release()
        for transfer, _ in slow.writes:
            transfer.settle()
    file.close()
    assert file.free_bytes >= num_bytes
