"""`headinfer plan --gpus`: what it prints, its JSON, and what it refuses."""

import json

import pytest

QUESTION = ("plan", "--model", "llama-3-8b", "--hardware", "h100-80gb", "--context", "400K")
TWO = (*QUESTION, "--gpus", "2", "--device-memory", "24GiB")
CARD = ("plan", "--model", "llama-3-70b", "--hardware", "rtx-4090", "--context", "32K")
EACH = [
    *("layers", "kv_heads", "weights_bytes", "kv_device_bytes", "resident_bytes"),
    *("activation_bytes", "kv_host_bytes", "raw_page_bytes", "runtime_bytes"),
    *("total_device_bytes", "busy"),
]


def test_a_person_reads_both_splits_beside_one_gpu(cli) -> None:
    outcome = cli(*TWO)
    assert outcome.code == 0
    told = " ".join(outcome.out.split())
    assert "400K tokens, on 2 x h100-80gb (as asked for): 24.00 GiB of each GPU's memory" in told
    for row in ("1 - standard", "1 - resident", "2 layers resident", "2 heads resident"):
        assert row in told
    assert "Chosen: 2 GPUs, split by heads" in told
    assert "Each GPU has 4 KV heads of every layer." in told
    assert "2 links bring " in told
    assert "times as long." in told
    assert "Run: torchrun --nproc-per-node 2 -m headinfer generate --tensor-parallel" in told
    assert max(map(len, outcome.out.splitlines())) <= 100


def test_json_has_every_gpu(cli) -> None:
    document = json.loads(cli(*TWO, "--json").out)
    plans = document["plans"]
    assert [(plan["gpus"], plan["split"], plan["method"]) for plan in plans] == [
        (1, "none", "standard"),
        (1, "none", "resident"),
        (2, "layers", "standard"),
        (2, "layers", "resident"),
        (2, "heads", "standard"),
        (2, "heads", "resident"),
    ]
    assert document["chosen"] == 5
    assert all(len(plan["each"]) == plan["gpus"] for plan in plans)
    assert all(list(each) == EACH for plan in plans for each in plan["each"])
    assert plans[3]["each"][0]["layers"] == 16
    assert plans[5]["each"][0]["kv_heads"] == 4


def test_a_model_that_no_gpu_holds_streams_its_weights(cli) -> None:
    outcome = cli(*CARD, "--gpus", "1")
    told = " ".join(outcome.out.split())
    assert outcome.code == 0
    assert "113.52 GiB of weights stay in CPU memory and cross the link for each token" in told
    assert "9.75 s at 12.5 GB/s" in told
    assert "Run: headinfer generate --gpus 1 ..." in told
    # Without --gpus nothing is streamed by `generate`, and so not by the plan.
    refused = cli(*CARD)
    assert refused.code == 1
    assert "--gpus 1, which keeps 113.52 GiB of the weights in CPU memory" in " ".join(
        refused.out.split()
    )


def test_what_a_disk_holds_of_the_weights_is_told_and_how_slowly(cli) -> None:
    told = " ".join(cli(*CARD, "--gpus", "1", "--host-memory", "64GiB").out.split())
    assert "of weights stay in CPU memory and 65.71 GiB on the disk" in told
    assert "and 1 GB/s from the disk, which is assumed." in told
    assert "Run: headinfer generate --gpus 1 --host-memory 10.0GiB ..." in told
    refused = cli(*CARD, "--host-memory", "64GiB")
    assert refused.code == 1
    assert "65.71 GiB on the disk: at least" in " ".join(refused.out.split())


def test_where_nothing_fits_it_says_what_is_lacking(cli) -> None:
    outcome = cli(*TWO[:-2], "--device-memory", "24GiB", "--host-memory", "40GiB")
    told = " ".join(outcome.out.split())
    assert outcome.code == 1
    assert "Nothing fits." in told
    assert "GiB of CPU memory are lacking" in told
    assert "is the longest that fits." in told
    assert "Run:" not in told


def test_weights_quantised_while_loaded_are_not_split(cli) -> None:
    plans = json.loads(cli(*TWO, "--load-in", "4bit", "--json").out)["plans"]
    assert plans[-1]["split"] == "heads"
    assert "--load-in quantises whole matrices" in plans[-1]["obstacle"]
    assert plans[3]["fits"]


@pytest.mark.slow
def test_quantised_weights_that_gpus_do_not_hold_say_what_is_lacking_and_what_would_do(cli) -> None:
    """35 GiB in 4 bits: bitsandbytes keeps none of them in CPU memory."""
    large = (*CARD, "--load-in", "4bit")
    outcome = cli(*large, "--gpus", "2")
    told = " ".join(outcome.out.split())
    assert outcome.code == 1
    assert "--load-in keeps no weights in CPU memory" in told
    assert "By layers does not fit: 1.80 GiB of GPU memory are lacking on the GPU with the" in told
    assert "Either of these would do: - --gpus 3 - --device-memory 25.9GiB, 1.80 GiB more" in told
    three = json.loads(cli(*large, "--gpus", "3", "--json").out)
    assert three["plans"][three["chosen"]]["split"] == "layers"
    assert three["changes"] == []
    assert cli(*large, "--gpus", "2", "--device-memory", "25.9GiB").code == 0
    assert cli(*large, "--gpus", "2", "--device-memory", "25.7GiB").code == 1
    one = json.loads(cli(*large, "--gpus", "1", "--json").out)
    assert one["chosen"] is None
    assert one["changes"][0]["gpus"] == 3
    # One GPU is asked for what the plan without --gpus asks for.
    alone = json.loads(cli(*large, "--json").out)["chosen"]["changes"]
    asked = alone[0]["device_memory_bytes"]
    assert one["changes"][1]["device_memory_bytes"] == asked
    assert all(change["gpus"] is None for change in alone)


def test_gpus_that_give_unlike_memory_are_joined_by_such_as_the_last(cli) -> None:
    asked = (*CARD, "--load-in", "4bit", "--gpus")
    outcome = cli(*asked, "3", "--device-memory", "24GiB,16GiB,8GiB", "--json")
    (change,) = json.loads(outcome.out)["changes"]
    assert (change["gpus"], change["device_memory_bytes"]) == (4, None)
    assert cli(*asked, "4", "--device-memory", "24GiB,16GiB,8GiB,8GiB").code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--gpus", "33"), "there are 33 GPUs, and llama-3-8b has 32 layers"),
        (
            ("--gpus", "3", "--device-memory", "24GiB,16GiB"),
            "device-memory has 2 values, but gpus is 3",
        ),
        (("--gpus", "2", "--accounting", "paper"), "leave out --accounting"),
        (("--gpus", "2", "--sparsity", "0.5"), "leave out --sparsity"),
        (("--gpus", "2", "--steps"), "leave out --gpus"),
        (("--device-memory", "24GiB,16GiB"), "give one value as --device-memory, or --gpus"),
    ],
)
def test_bad_input_is_told_in_one_line(process, args, message) -> None:
    outcome = process(*QUESTION, *args)
    assert outcome.code == 2
    assert len(outcome.error_lines) == 1
    assert message in outcome.err
