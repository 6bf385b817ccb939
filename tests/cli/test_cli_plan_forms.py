"""`headinfer plan --gpus --kv-cache`: what is said of tokens that are not dense in CPU memory."""

import json
from typing import Any

import pytest

QUESTION = ("plan", "--hardware", "h100-80gb", "--context", "400K", "--chunk-tokens", "4K")


def test_a_person_reads_the_form_and_the_room_for_pages_that_do_not_pack(cli) -> None:
    outcome = cli(*QUESTION, "--model", "phi-4", "--gpus", "2", "--kv-cache", "packed")
    told = " ".join(outcome.out.split())
    assert outcome.code == 0
    assert "KV on CPU: packed in our methods, 0.77 of its bytes" in told
    assert "KV is packed in CPU memory, where " in told
    assert "are set aside for pages that do not pack, by GPU: " in told
    assert "Run: headinfer generate --gpus 2 --kv-cache packed ..." in told
    assert max(map(len, outcome.out.splitlines())) <= 100
    alone = " ".join(cli(*QUESTION, "--kv-cache", "packed").out.split())
    assert "KV on CPU: packed in our methods, 0.77 of its bytes" in alone


def test_rows_of_8_bits_are_marked_and_json_names_the_form(cli) -> None:
    asked = (*QUESTION, "--gpus", "2", "--kv-cache", "fp8")
    outcome = cli(*asked)
    assert outcome.out.count("headinfer-fp8 ~") == 3
    assert "~: not exact by design" in outcome.out
    assert "packed" not in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 100
    document = json.loads(cli(*asked, "--json").out)
    assert document["kv_cache"] == "fp8"
    assert document["plans"][document["chosen"]]["method"] == "resident"
    layers = next(plan for plan in document["plans"] if plan["method"] == "headinfer-fp8")
    assert layers["each"][0]["raw_page_bytes"] > 0


def planned(cli, *given: str) -> dict[str, Any]:
    return json.loads(cli("plan", "--hardware", "rtx-4090", *given, "--json").out)


@pytest.mark.slow
def test_auto_is_what_attach_would_choose(cli) -> None:
    for context, form in (("32K", "dense"), ("128K", "packed")):
        auto = planned(cli, "--context", context)
        assert auto == planned(cli, "--context", context, "--kv-cache", form)
        assert auto["kv_cache"] == form
    long = ("--context", "128K")
    one = planned(cli, *long, "--gpus", "1")
    assert one == planned(cli, *long, "--gpus", "1", "--kv-cache", "packed")
    assert planned(cli, *long, "--gpus", "2")["kv_cache"] == "dense"
    assert planned(cli, *long, "--dtype", "float16")["kv_cache"] == "dense"
    assert planned(cli, *long, "--accounting", "paper")["kv_cache"] == "dense"


def test_a_disk_below_leaves_auto_dense(cli, tmp_path) -> None:
    given = ("--context", "1M", "--host-memory", "64GiB", "--disk-cache", str(tmp_path))
    assert planned(cli, *given)["kv_cache"] == "dense"


@pytest.mark.slow
def test_each_machine_chooses_its_own_form(cli) -> None:
    asked = ("plan", "--context", "128K", "--hardware", "rtx-4090,h100-80gb")
    told = " ".join(cli(*asked).out.split())
    assert "KV on CPU of rtx-4090: packed in our methods, 0.77 of its bytes" in told
    document = json.loads(cli(*asked, "--json").out)
    assert document["kv_cache"] == "auto"
    assert [row["kv_cache"] for row in document["rows"]] == ["packed", "dense"]
