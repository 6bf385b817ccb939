"""A cache that is saved and loaded goes on as the one that was not, under whatever options."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import headinfer
from headinfer.errors import CacheStateError, MemoryPlanError, OptionError, SessionFileError
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens, shared_model, tiny_model

SMALL: dict[str, Any] = {"chunk_tokens": 16, "tile_tokens": 8}
OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu", **SMALL},
    "cpu-large": {"device": "cpu", "chunk_tokens": 64, "tile_tokens": 50, "tile_heads": 1},
    "link": {"device": "simulated", "resident_tokens": 0, **SMALL},
    "shared": {"device": "simulated", "resident_tokens": 20, "host_attention": 0.5, **SMALL},
    "resident": {"device": "simulated", "resident_tokens": "all", "chunk_tokens": 33},
}
STREAMING: dict[str, Any] = {
    "sparsity": 0.5,
    "head_pattern": "random:3",
    "sink_tokens": 5,
    "recent_tokens": 24,
}
OTHERS = ["gemma3", "qwen3-next"]
"""Architectures that are saved and loaded in fewer pairs of options and dtypes than llama3 is."""

BLOCK = "40KiB"
"""Bytes of a page: several for a tiny model."""


def read(model: Any, cache: Any, *parts: torch.Tensor) -> torch.Tensor:
    """Return the logits of parts that go through a model one after the other."""
    logits = [model(part, **cache_argument(model, cache)).logits for part in parts]
    return torch.cat(logits, dim=1)


def conversation(name: str, batch: int) -> tuple[torch.Tensor, ...]:
    """Return what is read before a session is saved, and what comes behind.

    Where a model has windows, they have begun anew by then.
    """
    parts = [330 if name == "gemma3" else 170, 1, 1, 23, 1, 35]
    before, last, *after = random_tokens(batch, sum(parts)).split(parts, dim=1)
    return before, last, *after


def saved_session(model: Any, path: Path, parts: Any, **options: Any) -> Any:
    """Save what was read under some options; return the logits of the rest by who went on."""
    before, last, *after = parts
    with headinfer.attach(model, **options) as offload:
        cache = offload.new_cache(400)  # in one piece, as tiles of others would round otherwise
        read(model, cache, before, last)
        cache.save(path, block_bytes=BLOCK)
        return read(model, cache, *after)


@pytest.mark.covering("name", "saved", "loaded", most=2)
@pytest.mark.parametrize(
    ("name", "saved", "loaded"),
    [
        *(("llama3", saved, loaded) for saved in ("cpu", "shared") for loaded in OPTIONS),
        *((name, "cpu", loaded) for name in OTHERS for loaded in ("link", "shared", "resident")),
        *((name, "shared", loaded) for name in OTHERS for loaded in ("cpu", "cpu-large")),
    ],
)
def test_a_loaded_cache_goes_on_as_stock(
    name: str, saved: str, loaded: str, tmp_path: Path
) -> None:
    model, parts = shared_model(name), conversation(name, 1 if loaded == "link" else 2)
    before = torch.cat(parts[:2], dim=1)
    wanted = read(model, DynamicCache(config=model.config), *parts)[:, before.shape[1] :]
    saved_session(model, tmp_path / "s", parts, **OPTIONS[saved])
    with headinfer.attach(model, **OPTIONS[loaded]) as offload:
        cache = offload.load_cache(tmp_path / "s")
        assert cache.get_seq_length() == before.shape[1]
        assert cache.token_ids is not None
        assert torch.equal(cache.token_ids, before)
        torch.testing.assert_close(read(model, cache, *parts[2:]), wanted)


@pytest.mark.covering("name", "dtype", "option", most=3)
@pytest.mark.parametrize(
    ("name", "dtype", "option"),
    [
        *(("llama3", dtype, each) for dtype in (torch.float32, torch.bfloat16) for each in OPTIONS),
        *((name, torch.float32, each) for name in OTHERS for each in ("cpu", "link")),
        *((name, torch.bfloat16, each) for name in OTHERS for each in ("shared", "resident")),
    ],
)
def test_it_has_the_bits_of_the_one_that_went_on(
    name: str, dtype: torch.dtype, option: str, tmp_path: Path
) -> None:
    model, parts = tiny_model(name).to(dtype), conversation(name, 2)
    wanted = saved_session(model, tmp_path / "s", parts, **OPTIONS[option])
    with headinfer.attach(model, **OPTIONS[option]) as offload:
        got = read(model, offload.load_cache(tmp_path / "s", 400), *parts[2:])
    assert torch.equal(got, wanted)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("tokens", [4, 60, 331])
def test_streaming_heads_go_on(tokens: int, device: str, tmp_path: Path) -> None:
    model, text = shared_model("llama3"), random_tokens(2, 420)
    with headinfer.attach(model, device=device, **SMALL, **STREAMING) as offload:
        cache = offload.new_cache()
        read(model, cache, text[:, :tokens])
        cache.save(tmp_path / "s", block_bytes=BLOCK)
        wanted = read(model, cache, text[:, tokens : tokens + 1], text[:, tokens + 1 :])
    other = {"device": "simulated", "chunk_tokens": 32, "resident_tokens": 10}
    with headinfer.attach(model, **other, **STREAMING) as offload:
        cache = offload.load_cache(tmp_path / "s")
        got = read(model, cache, text[:, tokens : tokens + 1], text[:, tokens + 1 :])
        torch.testing.assert_close(got, wanted)
    for changes in ({"sparsity": 0.0, "head_pattern": None}, {"recent_tokens": 30}):
        streaming = {name: each for name, each in (STREAMING | changes).items() if each}
        if "sparsity" not in streaming:
            streaming = {}
        with (
            headinfer.attach(model, device=device, **streaming) as offload,
            pytest.raises(SessionFileError, match="6 streaming heads"),
        ):
            offload.load_cache(tmp_path / "s")


@pytest.mark.slow
def test_a_new_process_goes_on(tmp_path: Path) -> None:
    model, tokens = shared_model("gemma3"), random_tokens(1, 90)
    with headinfer.attach(model, **SMALL) as offload:
        cache = offload.new_cache()
        read(model, cache, tokens)
        cache.save(tmp_path / "s")
        wanted = model.generate(
            tokens, **cache.as_keyword(), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    program = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parents[1])]}
import torch, headinfer
from tiny_models import tiny_model
torch.set_num_threads(1)
model = tiny_model("gemma3")
with headinfer.attach(model, device="simulated", tile_tokens=8, resident_tokens=4) as offload:
    cache = offload.load_cache({str(tmp_path / "s")!r})
    cache.keep_common_prefix(cache.token_ids[0])
    ids = model.generate(torch.tensor({tokens.tolist()}), **cache.as_keyword(),
                         max_new_tokens=12, do_sample=False, pad_token_id=0)
print(ids.tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert json.loads(done.stdout) == wanted.tolist()


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_what_was_cropped_and_rearranged_is_saved_as_it_is(device: str, tmp_path: Path) -> None:
    model, tokens = shared_model("gemma3"), random_tokens(3, 120)
    with headinfer.attach(model, device=device, **SMALL) as offload:
        cache = offload.new_cache()
        read(model, cache, tokens[:, :90])
        cache.crop(-13)
        cache.batch_select_indices([2, 0])
        cache.batch_repeat_interleave(2)
        cache.save(tmp_path / "s")
        rows = tokens[[2, 2, 0, 0]]
        again = offload.load_cache(tmp_path / "s", max_tokens="1K")
        assert again.token_ids is not None
        assert torch.equal(again.token_ids, rows[:, :77])
        wanted = model(rows).logits[:, 77:]
        torch.testing.assert_close(read(model, again, rows[:, 77:]), wanted)
        again.crop(-43)
        again.save(tmp_path / "s")
        torch.testing.assert_close(
            read(model, offload.load_cache(tmp_path / "s"), rows[:, 77:]), wanted
        )


@pytest.mark.covering
@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-next"])
@pytest.mark.parametrize("shared", [0, 70, 95, 100, 119])
def test_of_another_prompt_the_common_beginning_is_kept(name: str, shared: int) -> None:
    model, read_before = shared_model(name), random_tokens(1, 100)
    fresh = random_tokens(1, 120, seed=9)
    fresh[:, 0] = (read_before[:, 0] + 1) % 90
    prompt = torch.cat([read_before[:, :shared], fresh], dim=1)[:, :120]
    with headinfer.attach(model, **SMALL) as offload:
        cache = offload.new_cache()
        read(model, cache, read_before)
        kept = cache.keep_common_prefix(prompt[0])
        same = min(shared, 100)
        # A state cannot go back. A window of 24 tokens can, by the tokens it spares.
        assert kept == (0 if name == "qwen3-next" and same < 100 else same)
        assert cache.get_seq_length() == kept
        got = read(model, cache, prompt[:, kept:])
    torch.testing.assert_close(got, model(prompt).logits[:, kept:])


def test_of_the_same_prompt_one_token_is_left_to_read() -> None:
    model, prompt = shared_model("llama3"), random_tokens(1, 50)
    with headinfer.attach(model, **SMALL) as offload:
        cache = offload.new_cache()
        read(model, cache, prompt)
        assert cache.keep_common_prefix(prompt[0].tolist()) == 49
        torch.testing.assert_close(read(model, cache, prompt[:, 49:]), model(prompt).logits[:, 49:])


def test_tokens_of_several_rows_or_without_ids_are_not_compared(tmp_path: Path) -> None:
    model, tokens = shared_model("llama3"), random_tokens(2, 40)
    with headinfer.attach(model, **SMALL) as offload:
        cache = offload.new_cache()
        read(model, cache, tokens)
        with pytest.raises(CacheStateError, match="holds 2 rows"):
            cache.keep_common_prefix(tokens[0])
        embedded = offload.new_cache()
        given = model.get_input_embeddings()(tokens)
        model(inputs_embeds=given, **cache_argument(model, embedded))
        assert embedded.token_ids is None
        embedded.save(tmp_path / "s")
        again = offload.load_cache(tmp_path / "s")
        assert again.token_ids is None
        wanted = model(torch.cat([tokens, tokens[:, :3]], dim=1)).logits[:, 40:]
        torch.testing.assert_close(read(model, again, tokens[:, :3]), wanted)
        assert again.keep_common_prefix(tokens[0]) == 0
        assert again.get_seq_length() == 0


@pytest.mark.parametrize("name", ["llama3", "qwen3-next"])
def test_what_was_read_before_a_stop_between_chunks_can_be_saved(name: str, tmp_path: Path) -> None:
    model, tokens = shared_model(name), random_tokens(1, 100)

    def stop(done: int, _all: int) -> None:
        if done >= 48:
            raise KeyboardInterrupt

    with headinfer.attach(model, **SMALL) as offload:
        cache = offload.new_cache()
        cache.progress = stop
        with pytest.raises(KeyboardInterrupt):
            read(model, cache, tokens)
        cache.progress = None
        held = cache.get_seq_length()
        assert 48 <= held < 100
        cache.save(tmp_path / "s")
        again = offload.load_cache(tmp_path / "s")
        assert again.keep_common_prefix(tokens[0]) == held
        wanted = model(tokens).logits[:, held:]
        for each in (cache, again):
            torch.testing.assert_close(read(model, each, tokens[:, held:]), wanted)


def test_nothing_and_what_is_half_done_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model("llama3")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with headinfer.attach(model, **SMALL) as offload:
        cache = offload.new_cache()
        with pytest.raises(CacheStateError, match="nothing to save"):
            cache.save(tmp_path / "s")
        read(model, cache, random_tokens(1, 20))
        with pytest.raises(OptionError, match="block_bytes"):
            cache.save(tmp_path / "s", block_bytes="many")
        handle = model.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(model, cache, random_tokens(1, 5))
        handle.remove()
        with pytest.raises(CacheStateError, match="was interrupted"):
            cache.save(tmp_path / "s")
        cache.close()
        with pytest.raises(CacheStateError, match="closed"):
            cache.save(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"seed": 1}, "its weights differ in "),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 4 and here 8"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta is "),
        ({"dtype": torch.bfloat16}, "its dtype is float32, and here it is bfloat16"),
    ],
    ids=["weights", "heads", "rotary", "dtype"],
)
def test_the_session_of_another_model_is_refused(
    other: dict[str, Any], words: str, tmp_path: Path
) -> None:
    saved_session(shared_model("llama3"), tmp_path / "s", conversation("llama3", 1), device="cpu")
    changes = dict(other)
    dtype = changes.pop("dtype", torch.float32)
    model = tiny_model("llama3", **changes).to(dtype)
    with (
        headinfer.attach(model) as offload,
        pytest.raises(SessionFileError, match="is of another model: ") as told,
    ):
        offload.load_cache(tmp_path / "s")
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_one_changed_matrix_is_another_model(tmp_path: Path) -> None:
    model = tiny_model("llama3")
    saved_session(model, tmp_path / "s", conversation("llama3", 1), device="cpu")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    with (
        headinfer.attach(model) as offload,
        pytest.raises(SessionFileError, match=r"differ in model\.layers\.1\.mlp\.up_proj\.weight$"),
    ):
        offload.load_cache(tmp_path / "s")


def test_a_session_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = shared_model("llama3")
    saved_session(model, tmp_path / "s", conversation("llama3", 1), device="cpu")
    with headinfer.attach(model, host_memory="100KiB") as offload:
        with pytest.raises(MemoryPlanError, match="saved KV cache of 171 tokens"):
            offload.load_cache(tmp_path / "s")
        assert offload.session.host_room(0).kv_bytes == 100 * 2**10
