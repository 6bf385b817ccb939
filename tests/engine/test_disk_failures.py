"""A write in the background fails: whoever goes on is told once, and no token is lost."""

import copy
import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import headinfer
from above_disk import SETTINGS
from headinfer.disk.transfer import Transfer
from headinfer.errors import DiskError
from slow_disk import LEFT, SlowDisk, in_memory, opened
from tiny_models import random_tokens, tiny_model

pytestmark = pytest.mark.usefixtures("inference")

FULL = OSError(errno.ENOSPC, "No space left on device")


def fed_until_one_is_written(model: Any, cache: Any, slow: SlowDisk, rows: int = 1) -> torch.Tensor:
    """Pass tokens until a block is on its way to the disk; return them."""
    fed: list[torch.Tensor] = []
    while not slow.under_way:
        fed.append(random_tokens(rows, 80))
        model(fed[-1], past_key_values=cache)
        assert len(fed) < 25
    return torch.cat(fed, 1)


def test_a_crop_that_is_refused_can_be_done_later(
    model: PreTrainedModel, tmp_path: Path, slow: SlowDisk
) -> None:
    prompt, rest = random_tokens(1, LEFT), random_tokens(1, 20)
    with opened(model, tmp_path, slow) as offload:
        cache = offload.new_cache(LEFT + 217)
        model(prompt, past_key_values=cache)
        assert slow.under_way
        slow.error = FULL
        slow.release_when(Transfer, "settle")
        with pytest.raises(DiskError):
            cache.crop(30 - LEFT)
        cache.crop(30 - LEFT)
        slow.error = None
        ours = model(rest, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(ours, in_memory(model, torch.cat([prompt[:, :30], rest], 1)))


def test_rows_that_could_not_be_reordered_can_be_later(
    model: PreTrainedModel, tmp_path: Path, slow: SlowDisk
) -> None:
    rest, order = random_tokens(2, 5), [1, 0]
    with opened(model, tmp_path, slow, memory="900KiB") as offload:
        cache = offload.new_cache(LEFT + 217)
        fed = fed_until_one_is_written(model, cache, slow, rows=2)
        slow.fail_all(FULL)
        with pytest.raises(DiskError):
            cache.reorder_cache(torch.tensor(order))
        slow.error = None
        cache.reorder_cache(torch.tensor(order))
        ours = model(rest, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(ours, in_memory(model, torch.cat([fed[order], rest], 1)))


def test_recurrent_states_outlast_a_disk_that_fails_twice(tmp_path: Path, slow: SlowDisk) -> None:
    kinds = ["linear_attention", "full_attention"]
    model = tiny_model("qwen3-next", num_hidden_layers=2, layer_types=kinds).eval()
    step = random_tokens(1, 1)
    slow.release()
    with headinfer.attach(model, **SETTINGS, disk_cache=tmp_path, host_memory="400KiB") as offload:
        slow.hold()
        cache = offload.new_cache(2000)
        fed = fed_until_one_is_written(model, cache, slow)
        slow.fail_all(FULL)
        for _ in range(2):
            with pytest.raises(DiskError):
                model(step, past_key_values=cache)
        slow.error = None
        ours = model(step, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(ours, in_memory(model, torch.cat([fed, step], 1)))


def test_a_write_that_fails_behind_a_chunk_leaves_the_history_right(
    model: PreTrainedModel, tmp_path: Path, slow: SlowDisk
) -> None:
    prompt = random_tokens(1, 773)
    with opened(model, tmp_path, slow) as offload:
        cache = offload.new_cache(900)
        slow.error = FULL
        append = cache.history.append

        def appended(ids: torch.Tensor | None) -> None:
            if slow.writes:
                slow.fail_all(FULL)
            append(ids)

        cache.history.append = appended
        with pytest.raises(DiskError):
            model(prompt, past_key_values=cache)
        del cache.history.append
        held = cache.get_seq_length()
        slow.error = None
        assert torch.equal(cache.token_ids, prompt[:, :held])
        ours = model(prompt[:, held:], past_key_values=cache).logits[:, -1]
        assert torch.equal(cache.token_ids, prompt)
    torch.testing.assert_close(ours, in_memory(model, prompt))


def test_another_cache_that_needs_memory_is_told_of_nothing(
    model: PreTrainedModel, tmp_path: Path, slow: SlowDisk
) -> None:
    with opened(model, tmp_path, slow, memory="700KiB", resident_tokens=32) as offload:
        cache = offload.new_cache(1200)
        fed_until_one_is_written(model, cache, slow)
        slow.fail_all(FULL)
        cache.state.engine.give_up_residents()  # for another cache
        with pytest.raises(DiskError):
            model(random_tokens(1, 1), past_key_values=cache)
        slow.error = None


def test_no_memory_is_kept_beside_blocks_where_none_is_planned(
    model: PreTrainedModel, tmp_path: Path, slow: SlowDisk
) -> None:
    with opened(model, tmp_path, slow) as offload:
        cache = offload.new_cache(LEFT + 217)
        model(random_tokens(1, LEFT), past_key_values=cache)
        engine = cache.state.engine
        slow.fail_all(FULL)
        with pytest.raises(DiskError):
            cache.get_seq_length()
        slow.error = None
        while engine.lower_blocks():  # for another cache
            pass
        planned = engine.plan.kv_host_bytes(LEFT + 217)
        for tokens in (1, 100):
            model(random_tokens(1, tokens), past_key_values=cache)
        assert engine.host_kv_bytes <= planned


def test_what_a_parked_cache_could_not_write_is_counted(
    model: PreTrainedModel, tmp_path: Path, slow: SlowDisk
) -> None:
    with opened(model, tmp_path, slow) as offload:
        cache = offload.new_cache(LEFT + 217)
        model(random_tokens(1, LEFT), past_key_values=cache)
        engine, unwritten_bytes = cache.state.engine, slow.under_way
        slow.fail_all(FULL)
        with pytest.raises(DiskError):
            cache.park()
        cache.park()
        held_bytes = engine.host_kv_bytes
        slow.error = None
        model(random_tokens(1, 1), past_key_values=cache)
        cache.park()
        assert held_bytes - engine.host_kv_bytes == unwritten_bytes > 0


def test_what_failed_is_written_anew_for_a_fork(
    model: PreTrainedModel, tmp_path: Path, slow: SlowDisk
) -> None:
    with opened(model, tmp_path, slow, memory="700KiB") as offload:
        cache = offload.new_cache(1200)
        fed = fed_until_one_is_written(model, cache, slow)
        slow.fail_all(FULL)
        with pytest.raises(DiskError):
            copy.deepcopy(cache)
        failed = {first for what, first, _ in slow.log if what == "failure"}
        slow.error = None
        slow.log.clear()
        forked = copy.deepcopy(cache)
        assert failed <= {first for what, first, _ in slow.log if what == "write"}
        cache.close()
        rest = random_tokens(1, 40)
        ours = model(rest, past_key_values=forked).logits[:, -1]
    torch.testing.assert_close(ours, in_memory(model, torch.cat([fed, rest], 1)))
