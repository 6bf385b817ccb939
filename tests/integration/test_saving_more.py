"""A session that has grown is saved again: what is on the disk already is not written again."""

from pathlib import Path
from typing import Any

import pytest
import torch

import headinfer
from headinfer.errors import SessionFileError
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens, shared_model

OPTIONS: dict[str, Any] = {"device": "cpu", "chunk_tokens": 16, "tile_tokens": 8}
BLOCK = {"llama3": "40KiB", "gemma3": "8KiB", "qwen3-next": "16KiB"}


def read(model: Any, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, **cache_argument(model, cache)).logits


def pages(path: Path) -> set[str]:
    return {each.name for each in path.glob("*-0*.safetensors")}


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-next"])
def test_only_new_pages_are_written(name: str, parked: bool, tmp_path: Path) -> None:
    model, text, path = shared_model(name), random_tokens(1, 420), tmp_path / "s"
    with headinfer.attach(model, **OPTIONS) as offload:
        cache = offload.new_cache()
        read(model, cache, text[:, :300])
        first = cache.save(path, block_bytes=BLOCK[name])
        before = pages(path)
        assert len(before) > 5
        read(model, cache, text[:, 300:360])
        if parked:
            cache.park()
        second = cache.save(path, block_bytes=BLOCK[name])
        assert len(before - pages(path)) <= 1, "full pages were written again"
        assert second.tokens == 360
        assert second.num_bytes < first.num_bytes
        between = pages(path)
        cache.save(path, block_bytes=BLOCK[name])
        assert len(between ^ pages(path)) <= 2
        wanted = read(model, cache, text[:, 360:])
    with headinfer.attach(model, **OPTIONS) as offload:
        loaded = offload.load_cache(path)
        assert torch.equal(loaded.token_ids, text[:, :360])
        torch.testing.assert_close(read(model, loaded, text[:, 360:]), wanted)
        loaded.save(path, block_bytes=BLOCK[name])
        assert len(between - pages(path)) <= 1
        assert offload.load_cache(path).get_seq_length() == 420


def test_what_was_taken_back_and_read_otherwise_is_written(tmp_path: Path) -> None:
    model, text, other = shared_model("llama3"), random_tokens(1, 300), random_tokens(1, 90, seed=9)
    path = tmp_path / "s"
    with headinfer.attach(model, **OPTIONS) as offload:
        cache = offload.new_cache()
        read(model, cache, text)
        cache.save(path, block_bytes=BLOCK["llama3"])
        fork = cache.fork()
        fork.crop(-90)
        read(model, fork, other)
        fork.save(path, block_bytes=BLOCK["llama3"])
        wanted = torch.cat([text[:, :210], other], dim=1)
        loaded = offload.load_cache(path)
        assert torch.equal(loaded.token_ids, wanted)
        keys = model(wanted, use_cache=True).past_key_values
        for ours, stock in zip(loaded.layers, keys.layers, strict=True):
            torch.testing.assert_close(ours.keys, stock.keys)
        cache.save(path, block_bytes=BLOCK["llama3"])  # the other one has saved there since
        assert torch.equal(offload.load_cache(path).token_ids, text)


def test_pages_of_another_cache_are_never_taken_for_its_own(tmp_path: Path) -> None:
    model, text, path = shared_model("llama3"), random_tokens(1, 300), tmp_path / "s"
    with headinfer.attach(model, **OPTIONS) as offload:
        first, second = offload.new_cache(), offload.new_cache()
        read(model, first, text)
        read(model, second, random_tokens(1, 300, seed=8))
        whole = first.save(path, block_bytes=BLOCK["llama3"]).num_bytes
        assert second.save(path, block_bytes=BLOCK["llama3"]).num_bytes == whole
        assert first.save(path, block_bytes=BLOCK["llama3"]).num_bytes == whole
        assert first.save(tmp_path / "t", block_bytes=BLOCK["llama3"]).num_bytes < whole / 4


def test_a_damaged_page_that_was_kept_is_found(tmp_path: Path) -> None:
    model, text, path = shared_model("llama3"), random_tokens(1, 400), tmp_path / "s"
    with headinfer.attach(model, **OPTIONS) as offload:
        cache = offload.new_cache()
        read(model, cache, text[:, :300])
        cache.save(path, block_bytes=BLOCK["llama3"])
        page = min(path.glob("*-000001.safetensors"))
        data = bytearray(page.read_bytes())
        data[-5] ^= 1
        read(model, cache, text[:, 300:])
        cache.save(path, block_bytes=BLOCK["llama3"])
        page.write_bytes(data)
        with pytest.raises(SessionFileError, match=page.name):
            offload.load_cache(path)
        kept = offload.load_cache(path, partial=True)
        assert 0 < kept.get_seq_length() < 100
        assert torch.equal(kept.token_ids, text[:, : kept.get_seq_length()])
        read(model, kept, text[:, kept.get_seq_length() :])
        kept.save(path, block_bytes=BLOCK["llama3"])
        assert torch.equal(offload.load_cache(path).token_ids, text)


def test_a_session_elsewhere_shares_the_files_of_what_both_have(tmp_path: Path) -> None:
    model, text = shared_model("llama3"), random_tokens(1, 400)
    with headinfer.attach(model, **OPTIONS) as offload:
        cache = offload.new_cache()
        read(model, cache, text[:, :300])
        first = cache.save(tmp_path / "s", block_bytes=BLOCK["llama3"])
        fork = cache.fork()
        fork.crop(-50)
        read(model, fork, text[:, 300:])
        second = fork.save(tmp_path / "t", block_bytes=BLOCK["llama3"])
        assert second.num_bytes < first.num_bytes * 0.7
        shared = pages(tmp_path / "s") & pages(tmp_path / "t")
        assert len(shared) > 4
        for each in (tmp_path / "s").iterdir():
            each.unlink()
        wanted = torch.cat([text[:, :250], text[:, 300:]], dim=1)
        loaded = offload.load_cache(tmp_path / "t")
        assert torch.equal(loaded.token_ids, wanted)
        fork.close()
        again = offload.load_cache(tmp_path / "t")
        again.save(tmp_path / "u", block_bytes=BLOCK["llama3"])
        assert torch.equal(offload.load_cache(tmp_path / "u").token_ids, wanted)
