"""`headinfer plan` with several machines or numbers of GPUs: a row for each, and why not."""

import json
import re

import pytest

from headinfer.estimate.machines import HARDWARE

QUESTION = ("plan", "--model", "llama-3-8b", "--context", "400K", "--chunk-tokens", "8K")
LARGE = ("plan", "--model", "llama-3-70b", "--context", "64K", "--chunk-tokens", "4K")


def test_rows_say_what_the_plan_of_each_machine_says(cli) -> None:
    document = json.loads(cli(*QUESTION, "--hardware", "rtx-3090, h200", "--json").out)
    assert [row["hardware"] for row in document["rows"]] == ["rtx-3090", "h200"]
    for row in document["rows"]:
        chosen = json.loads(cli(*QUESTION, "--hardware", row["hardware"], "--json").out)["chosen"]
        for name in ("method", "max_context_tokens", "prefill_s", "decode_s_per_token"):
            assert row[name] == chosen[name]
        assert row["fits"]
        assert row["lacking"] is None
        assert (row["gpus"], row["split"]) == (1, "none")
        assert row["device_memory_bytes"] == [HARDWARE[row["hardware"]].device_memory_bytes]
    assert document["fastest"] == 1


def test_each_number_of_gpus_has_its_best_split(cli) -> None:
    asked = (*LARGE, "--hardware", "h100-80gb", "--json")
    document = json.loads(cli(*asked, "--gpus", "1,3,2").out)
    rows = document["rows"]
    assert [(row["gpus"], row["split"]) for row in rows] == [
        (1, "none"),
        (3, "layers"),  # which cannot share 8 heads
        (2, "heads"),
    ]
    assert document["fastest"] == 2
    for row in rows:
        plans = json.loads(cli(*asked, "--gpus", row["gpus"]).out)["plans"]
        (plan,) = (
            plan
            for plan in plans
            if (plan["gpus"], plan["split"], plan["method"])
            == (row["gpus"], row["split"], "resident")
        )
        for name in ("brought_bytes", "max_context_tokens", "prefill_s", "decode_s_per_token"):
            assert row[name] == plan[name]
    assert rows[0]["brought_bytes"] > 60 * 2**30


def test_a_person_sees_which_is_fastest_and_what_others_lack(cli) -> None:
    asked = ("--hardware", "rtx-4090,h200", "--gpus", "1,2,4", "--load-in", "4bit")
    outcome = cli(*LARGE, *asked)
    assert outcome.code == 0
    assert max(map(len, outcome.out.splitlines())) <= 100
    told = " ".join(outcome.out.split())
    assert "rtx-4090 2 24.0 512 - - 0 - -" in told
    assert re.search(r"h200 4 131 512 layers resident \S+ \S+ s \S+ ms", told)
    assert "Fastest with a short answer: 4 x h200" in told
    assert "- 2 x rtx-4090: 1.80 GiB of GPU memory are lacking" in told
    assert "weights off GPU" not in told


def test_where_nothing_fits_equal_reasons_are_one_line(cli) -> None:
    asked = ("--hardware", "rtx-4090,rtx-3090", "--gpus", "1,2", "--host-memory", "16GiB")
    outcome = cli(*LARGE, *asked)
    assert outcome.code == 1
    told = " ".join(outcome.out.split())
    assert "Nothing fits. - 1, 2 x rtx-4090; 1, 2 x rtx-3090: " in told
    assert "GiB of CPU memory are lacking." in told
    assert "\nweights off GPU" not in outcome.out


def test_weights_that_cross_the_link_have_a_column_and_it_fits_a_narrow_terminal(cli) -> None:
    outcome = cli(*LARGE, "--hardware", "rtx-4090", "--gpus", "1,81")
    told = " ".join(outcome.out.split())
    assert "rtx-4090 1 24.0 512 - resident 114 " in told
    assert "weights off GPU: in GiB, they cross the link for each token" in told
    assert "81 x rtx-4090: The model has 80 layers, and each GPU needs one." in told
    table = outcome.out.split("Memory in GiB")[0].splitlines()[1:]
    assert max(map(len, table)) <= 80


def test_all_machines_are_those_that_help_names(cli) -> None:
    helped = " ".join(cli("plan", "--help").out.replace("│", " ").split())
    rows = json.loads(cli("plan", "--context", "8K", "--hardware", "all", "--json").out)["rows"]
    assert [row["hardware"] for row in rows] == [*HARDWARE]
    assert f"{', '.join(HARDWARE)}, or this: as measured" in helped


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--hardware", "h200,abacus"), "hardware 'abacus' is not known"),
        (("--hardware", "h200,"), "--hardware 'h200,' has a comma too many"),
        (("--hardware", "h200,a100-80gb", "--steps"), "--steps are of one machine"),
        (("--gpus", "1,two"), "--gpus must be a number from 1 to 1024, or several such as 1,2,4"),
        (("--gpus", "0"), "not '0'"),
        (("--gpus", "1025"), "not '1025'"),
        (("--gpus", "1,2", "--device-memory", "24GiB,16GiB"), "has 2 values, but gpus is 1"),
    ],
)
def test_bad_input_is_one_line(cli, args, message) -> None:
    outcome = cli(*QUESTION, *args)
    assert outcome.code == 2
    assert outcome.out == ""
    assert message in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
