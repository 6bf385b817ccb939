"""Models whose heads are split over two ranks, against the whole model in one process."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from launching import said_by_ranks, torchrun
from split_models import (
    DEVICES,
    LATE_RUN,
    MODELS,
    ON,
    ON_GPUS,
    PATTERN,
    STREAMED_RUNS,
    STREAMED_TOKENS,
    UNEVEN,
    VOCABULARY,
    answers,
    last_logits,
    logits,
    prompt,
    save_uneven_pattern,
)
from transformers import DynamicCache

import headinfer
from headinfer.bench.fill import fill_randomly
from headinfer.device.host_memory import all_host_bytes
from tiny_models import tiny_model

RANKS = 2
HEADS = {"llama3": 2, "qwen2": 1, "mistral-sliding": 1, "phi3": 2}
"""KV heads of a layer in each rank."""

PROGRAM = Path(__file__).parent / "split_program.py"


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: tiny_model(name, vocab_size=VOCABULARY, **MODELS[name]) for name in MODELS}


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory) -> Path:
    """A folder with all models, one for all processes of a test run: ranks answer once."""
    base = tmp_path_factory.getbasetemp()
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "split"
    with FileLock(f"{made}.lock"):
        if (made / "uneven.json").exists():
            return made
        for name, model in models.items():
            model.save_pretrained(made / name)
        one = tiny_model("llama3", vocab_size=VOCABULARY, num_key_value_heads=1)
        one.save_pretrained(made / "one-kv-head")
        save_uneven_pattern(made / "uneven.json", models["llama3"].config.num_hidden_layers)
    return made


def got_by_ranks(folder: Path, *parts: str, on_gpus: bool) -> list[dict[str, Any]]:
    with FileLock(f"{folder}.lock"):
        done = torchrun(str(PROGRAM), str(folder), *parts, on_gpus=on_gpus)
        assert done.returncode == 0, said_by_ranks(done.stderr)
        files = [folder / f"rank{rank}.pt" for rank in range(RANKS)]
        answered = [torch.load(file) for file in files]
        for file in files:  # the next ranks tell what lies in the folder
            file.unlink()
        return answered


@pytest.fixture(scope="module")
def got(folder) -> list[dict[str, Any]]:
    """What each rank got, on the CPU with gloo."""
    answered = folder.with_suffix(".pt")
    with FileLock(f"{answered}.lock"):
        if not answered.exists():
            torch.save(got_by_ranks(folder, on_gpus=False), answered)
    return torch.load(answered)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")
def test_ranks_on_two_gpus_answer_as_the_whole_model_does(folder, models) -> None:
    parts = "parity", "patterns", "agreement", "stopping", "streamed_in_one_launch"
    got = got_by_ranks(folder, *parts, on_gpus=True)
    for name, device in ON_GPUS:
        model, at = models[name], f"{name} {device}"
        wanted, whole = answers(model, dict), logits(model, {})
        heads = model.config.num_key_value_heads // (1 if name == "phi3" else RANKS)
        for rank in got:
            for how in ("one row", "two rows", "beams"):  # other generators draw other samples
                assert rank[at][how].tolist() == wanted[how].tolist(), (at, how)
            torch.testing.assert_close(rank[f"{at} logits"], whole, atol=1e-3, rtol=1e-3)
            assert set(rank[f"{at} kv_heads"]) == {heads}
        first, second = (rank[at]["sampled"] for rank in got)
        assert first.tolist() == second.tolist()
        first, second = (rank[f"{at} captured"] for rank in got)
        assert first == second > 0, at
    for rank in got:
        assert "2 ranks of the model were given different tokens" in rank["other tokens"]
        assert rank["host memory"].startswith("MemoryPlanError: ")
        for name, late in STREAMED_RUNS:
            ids, forms, captured = rank[f"{name} {late} streamed"]
            assert ids.tolist() == got[0][f"{name} {late} streamed"][0].tolist()
            assert "STREAMED" in forms, name
            assert captured > 0, name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs")
def test_ranks_on_two_gpus_above_a_disk_answer_as_from_memory_alone(folder) -> None:
    # A GPU's host memory comes in pieces, at whose ends tiles end, and the disk's blocks do not.
    for rank in got_by_ranks(folder, "above_disk", on_gpus=True):
        for how in ("alike", "apart"):
            for ours, wanted in zip(rank[f"on disk {how}"], rank["in memory"], strict=True):
                torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
            assert rank[f"on disk {how} bytes"] > 0


@pytest.mark.parametrize(("name", "device"), ON)
def test_ranks_answer_as_the_whole_model_does(got, models, name, device) -> None:
    wanted = answers(models[name], dict)
    for rank in got:
        for how, ids in wanted.items():
            assert rank[f"{name} {device}"][how].tolist() == ids.tolist(), how
        torch.testing.assert_close(
            rank[f"{name} {device} logits"], logits(models[name], {}), atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(("name", "device"), ON)
def test_each_rank_keeps_its_own_heads(got, models, name, device) -> None:
    model, heads = models[name], HEADS[name]
    cache = model(prompt(1)).past_key_values
    for index, rank in enumerate(got):
        assert set(rank[f"{name} {device} kv_heads"]) == {heads}
        split = model.config.num_key_value_heads // heads == RANKS
        own = slice(index * heads, (index + 1) * heads) if split else slice(None)
        torch.testing.assert_close(
            rank[f"{name} {device} keys"], cache.layers[0].keys[:, own], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize(("name", "heads"), [("llama3", 2), ("phi3", 2)])
def test_each_rank_is_filled_with_its_own_heads(got, models, name, heads) -> None:
    stock = DynamicCache(config=models[name].config)
    fill_randomly(models[name], stock, 40, seed=1)
    wanted = stock.layers[0].keys
    for index, rank in enumerate(got):
        own = slice(index * heads, (index + 1) * heads) if name == "llama3" else slice(None)
        assert rank[f"{name} cpu filled"].equal(wanted[:, own])


@pytest.mark.parametrize("name", [name for name, device in ON if device == "simulated"])
def test_ranks_capture_and_replay_the_same_steps(got, name) -> None:
    first, second = (rank[f"{name} simulated captured"] for rank in got)
    assert first == second > 0


@pytest.fixture(scope="module")
def streamed_ids(models) -> list[int]:
    ids = models["llama3"].generate(
        prompt(1), do_sample=False, pad_token_id=0, max_new_tokens=STREAMED_TOKENS
    )
    return ids.tolist()


@pytest.fixture(scope="module")
def got_streamed(folder) -> list[dict[str, Any]]:
    return got_by_ranks(folder, "streamed_in_one_launch", on_gpus=False)


@pytest.mark.parametrize(
    ("name", "late"),
    [pytest.param(*run, marks=[pytest.mark.slow] * (run != LATE_RUN)) for run in STREAMED_RUNS],
)
def test_streamed_steps_of_ranks_are_one_launch(request, streamed_ids, name, late) -> None:
    """Also where one of them is ready for it later: both are in pieces until then."""
    got = request.getfixturevalue("got" if late else "got_streamed")
    replayed = []
    for rank in got:
        ids, forms, captured = rank[f"{name} {late} streamed"]
        assert ids.tolist() == streamed_ids
        assert "STREAMED" in forms
        assert ("IN_PIECES" in forms) == late
        replayed.append(captured)
    assert replayed[0] == replayed[1] > STREAMED_TOKENS // 2


def test_a_rank_takes_its_share_of_cpu_memory(got, models) -> None:
    with headinfer.attach(models["llama3"], **DEVICES["cpu"]) as offload:
        answers(models["llama3"], lambda: offload.new_cache().as_keyword())
        whole = offload.stats.host_kv_bytes
    for rank in got:
        assert 0 < rank["llama3 cpu host bytes"] <= 0.6 * whole
        assert rank["host room"] == (all_host_bytes() // RANKS, 2**30 // RANKS)
        assert rank["host room beside others"] == 2**30 // 4


def test_a_pattern_is_cut_to_the_heads_of_each_rank(got, models) -> None:
    with headinfer.attach(models["llama3"], chunk_tokens=16, **PATTERN) as offload:
        wanted = logits(models["llama3"], offload.new_cache().as_keyword())
        whole = [layer.streaming for layer in offload.plan.shape.layers]
    for at, streaming in enumerate(whole):
        heads = [
            2 * index + head
            for index, rank in enumerate(got)
            for head in rank["streaming"][at] or ()
        ]
        assert heads == list(() if streaming is None else streaming.heads)
    for rank in got:
        torch.testing.assert_close(rank["pattern logits"], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_rank_whose_heads_all_stream_goes_on_with_the_others(got, models, folder, device) -> None:
    asked = DEVICES[device] | UNEVEN | {"head_pattern": folder / "uneven.json"}
    with headinfer.attach(models["llama3"], device=device, **asked) as offload:
        wanted = last_logits(models["llama3"], offload.new_cache().as_keyword())
    for rank in got:
        for ours, whole in zip(rank[f"uneven {device}"], wanted, strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-4)


def test_other_splits_are_refused_by_name(got) -> None:
    for rank in got:
        assert "LlamaForCausalLM is split over 2 processes by FSDP; only tensor" in rank["FSDP"]


def test_chunks_are_as_long_as_the_shortest_of_all_ranks(got, models) -> None:
    wanted = answers(models["llama3"], dict)
    for rank in got:
        for how, ids in wanted.items():
            assert rank["own chunks"][how].tolist() == ids.tolist(), how


def test_what_one_rank_lacks_memory_for_is_refused_by_all(got) -> None:
    for asked in ("host memory", "device memory"):
        first, second = (rank[asked] for rank in got)
        assert first.startswith("MemoryPlanError: "), asked
        assert first == second


def test_calls_that_differ_between_ranks_are_refused(got) -> None:
    for rank in got:
        assert "2 ranks of the model were given different tokens" in rank["other tokens"]
        assert rank["clock"].startswith("OptionError: max_time")


def test_a_rank_that_stops_early_stops_all(got) -> None:
    first, second = (rank["stopped after"] for rank in got)
    assert 3 <= first < 100
    assert 3 <= second < 400


@pytest.mark.parametrize("how", ["alike", "apart"])
def test_ranks_above_a_disk_have_the_bits_of_memory_alone(got, how) -> None:
    """Also where one of them has to lower blocks for a second cache, and the other has not."""
    for rank in got:
        for ours, wanted in zip(rank[f"on disk {how}"], rank["in memory"], strict=True):
            assert torch.equal(ours, wanted)
    read = [rank[f"on disk {how} bytes"] for rank in got]
    assert min(read) > 0
    assert (read[0] == read[1]) is (how == "alike")
    limits = (2 * 2**20, 1200 * 1024) if how == "apart" else (1400 * 1024,) * 2
    for rank, limit in zip(got, limits, strict=True):
        assert rank[f"on disk {how} held"] <= limit // RANKS


def test_a_disk_that_one_rank_cannot_use_is_refused_by_all(got) -> None:
    for asked, words in (("full disk", "has room for 250.00 KiB"), ("no folder", "is not there")):
        first, second = (rank[asked] for rank in got)
        assert words in first
        assert first.split(": ", 1)[1] == second.split(": ", 1)[1]


def test_a_folder_that_one_rank_lacks_is_no_error_before_all_refuse(got) -> None:
    """Where nothing is simulated, each rank looks for what was measured of its disk."""
    for rank in got:
        assert rank["no folder on the CPU"].startswith("OptionError: disk_cache is for a GPU's")


def test_files_of_ranks_have_no_names(got) -> None:
    assert all(rank["files"] == ["uneven.json"] for rank in got)


def test_fewer_kv_heads_than_ranks_are_refused_by_name(got) -> None:
    for rank in got:
        assert rank["one head"] == (
            "UnsupportedModelError: LlamaForCausalLM has 1 KV head in a layer, which 2 ranks "
            "cannot share evenly; start a number of ranks that divides 1"
        )
