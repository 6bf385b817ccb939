"""`headinfer plan`: what it prints, its JSON, its errors, and what it does not import."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

from headinfer.estimate.presets import PRESETS
from headinfer.probe import keep
from measurements import CPU_ONLY, WITH_GPU, measured_here

ROW = [
    *("method", "tile_heads", "tile_tokens", "weights_bytes", "kv_device_bytes"),
    *("activation_bytes", "runtime_bytes", "total_device_bytes", "kv_total_bytes", "kv_host_bytes"),
    *("kv_disk_bytes", "max_context_tokens", "prefill_s", "decode_s_per_token"),
]
QUESTION = ("plan", "--model", "llama-3-8b", "--device-memory", "24GiB", "--host-memory", "1TiB")


@pytest.fixture(autouse=True)
def _not_probed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_a_person_reads_every_method_and_why(cli) -> None:
    outcome = cli(*QUESTION, "--context", "1M")
    assert outcome.code == 0
    assert "on rtx-4090 (assumed)" in outcome.out
    told = " ".join(outcome.out.split())
    assert "this machine is not measured yet; rtx-4090 is assumed: --hardware names" in told
    for name in ("standard", "kv-4bit", "layer-wise", "head-wise-1", "adaptive", "bounded"):
        assert f"  {name} " in outcome.out
    assert "total: with 1.25 for CUDA itself" in outcome.out
    parts = "context and libraries 0.75, captured decode steps 0.12, fragments 0.38"
    assert f"CUDA itself: {parts}\n" in outcome.out
    assert "> resident" in outcome.out
    assert "Chosen: resident" in outcome.out
    assert "…" not in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 100


def test_the_steps_of_the_chosen_method(cli) -> None:
    options = "--device-memory", "24GiB", "--host-memory", "1TiB", "--steps"
    result = cli("plan", "--context", "1M", *options)
    assert result.code == 0
    _, steps = result.out.split("A decode step, behind 1M tokens:\n")
    decode, chunk = steps.split("\nThe last chunk of ")
    assert decode.startswith("layers 0-31:\n  keep the new tokens in the page\n  fetch tokens ")
    assert "\n  attend by 4 x 2 heads: the residents, the page, the tiles\n" in decode
    assert chunk.endswith(" to 1048576 home\n")
    windows = cli("plan", "--model", "gpt-oss-20b", "--context", "128K", *options)
    assert "layers 0, 2, 4, " in windows.out
    assert "attend the residents and the new token, and keep it there" in windows.out
    nothing = cli("plan", "--context", "1M", "--device-memory", "1GiB", "--steps")
    assert nothing.code == 1
    assert "No steps to print" in nothing.out


def test_json_is_as_documented(cli) -> None:
    outcome = cli(*QUESTION, "--context", "1M", "--hardware", "h200", "--json")
    document = json.loads(outcome.out)
    names = ["model", "hardware", "kv_cache", "context_tokens", "disk", "methods", "chosen"]
    assert list(document) == names
    assert document["model"] == "llama-3-8b"
    assert document["hardware"] == "h200"
    assert document["context_tokens"] == 2**20
    assert all(list(row) == ROW for row in document["methods"])
    assert list(document["chosen"])[: len(ROW)] == ROW
    by_name = {row["method"]: row for row in document["methods"]}
    assert by_name["standard"]["tile_heads"] is None
    assert by_name["head-wise-4"]["tile_tokens"] == "all"
    assert by_name["bounded"]["tile_tokens"] == 2**17


def test_json_goes_to_a_file_beside_the_table(cli, tmp_path) -> None:
    path = tmp_path / "plan.json"
    outcome = cli("plan", "--json", path)
    assert outcome.code == 0
    assert "Chosen:" in outcome.out
    assert json.loads(path.read_text())["context_tokens"] == 2**17


@pytest.mark.parametrize("form", ["packed", "int8"])
def test_the_papers_accounting_refuses_other_forms_of_tokens(cli, form) -> None:
    outcome = cli(*QUESTION, "--accounting", "paper", "--kv-cache", form)
    assert outcome.code == 2
    assert outcome.err.strip().endswith("counts dense KV alone; leave out --kv-cache")


def test_tokens_that_the_config_has_in_float16_are_not_planned_packed(cli, tmp_path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**PRESETS["llama-3-8b"], "dtype": "float16"}))
    asked = "plan", "--model", str(config), "--context", "128K", "--kv-cache", "packed"
    outcome = cli(*asked)
    assert outcome.code == 2
    assert "names float16; leave out --kv-cache, or give --dtype bfloat16" in outcome.err
    assert cli(*asked, "--dtype", "bfloat16", "--device-memory", "24GiB").code == 0


def test_the_papers_accounting(cli) -> None:
    outcome = cli(*QUESTION, "--context", "1M", "--accounting", "paper", "--json", "-")
    rows = {row["method"]: row for row in json.loads(outcome.out)["methods"]}
    assert rows["standard"]["activation_bytes"] == 64 * 2**30
    assert rows["standard"]["runtime_bytes"] == 0
    assert rows["head-wise-1"]["kv_device_bytes"] == 2**30


def test_where_nothing_fits_it_says_what_would(cli) -> None:
    asked = ("plan", "--context", "16M", "--kv-cache", "dense")
    outcome = cli(*asked, "--host-memory", "512GiB")
    assert outcome.code == 1
    assert "No exact method fits." in outcome.out
    assert "--host-memory 2097.0GiB, 1.55 TiB more" in outcome.out
    assert "--context 3970K, the longest that fits" in outcome.out
    document = json.loads(cli(*asked, "--json").out)
    assert document["chosen"]["method"] is None
    assert document["chosen"]["changes"][-1]["context_tokens"] == 3970 * 2**10


@pytest.mark.slow
def test_host_memory_is_not_planned_to_the_last_byte(cli) -> None:
    # 122 GiB of locked KV beside 126 GiB of memory ended the process, 116 GiB did not.
    options = ("--hardware", "rtx-4090", "--host-memory", "126GiB", "--kv-cache", "dense")
    assert cli("plan", "--context", "928K", *options).code == 0
    outcome = cli("plan", "--context", "976K", *options)
    assert outcome.code == 1
    assert "122.00 GiB there, and 5.62 GiB" in outcome.out


def test_the_papers_tables(cli) -> None:
    outcome = cli("plan", "--paper")
    assert outcome.code == 0
    assert "207 / 206.96" in outcome.out
    assert "550 / 536" in outcome.out
    assert "6.51 / 5.51" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("args", "message"),
    [
        pytest.param(("--model", "llama-9"), "llama-9", marks=pytest.mark.slow),
        (("--context", "long"), "'long' is not a token count"),
        (("--device-memory", "much"), "'much' is not a memory size"),
        (("--hardware", "abacus"), "hardware 'abacus' is not known"),
        (("--hardware", "this"), "run `headinfer probe` first"),
        (("--batch", "0"), "--batch"),
        (("--paper", "--json"), "leave out --json"),
        (("--paper", "--context", "1M"), "leave out --context"),
        (("--context", "1M", "--context", "2M"), "--context is given 2 times"),
        (("--device-memory", "24"), "--device-memory: '24' is in bytes; did you mean '24GiB'"),
        (("--json", "missing/plan.json"), "there is no folder"),
    ],
)
def test_bad_input_is_told_in_one_line(process, tmp_path, args, message) -> None:
    outcome = process("plan", *args, XDG_CACHE_HOME=str(tmp_path))
    assert outcome.code == 2
    assert len(outcome.error_lines) == 1
    assert message in outcome.err


def test_presets_need_neither_torch_nor_transformers(command) -> None:
    program = """
import sys
from headinfer.cli.main import app
try:
    app(["plan", "--context", "1M"], standalone_mode=False)
except SystemExit:
    pass
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], env=command[1], check=True)


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_no_home_folder_is_needed(cli, monkeypatch, home) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    for model in ("llama-3-8b", "demo"):
        done = cli("plan", "--model", model, "--context", "4K")
        assert done.code == 0
        assert all(line.startswith("note: the demo model") for line in done.error_lines)
        assert "not measured yet" in done.out
    done = cli("plan", "--model", "llama-3-8b", "--hardware", "this")
    assert done.code == 2
    assert "headinfer probe" in done.err
    done = cli("probe", "--device", "cpu")
    assert done.code == 2
    assert "this user has no home folder" in done.err


@pytest.mark.parametrize("context", ["4K", "1M"])
def test_a_machine_without_a_gpu_has_one_memory(cli, context) -> None:
    save_cpu_with(24)
    outcome = cli("plan", "--context", context)
    text = outcome.out.lower().replace("there is no device beside the cpu", "")
    assert outcome.code == (context == "1M")
    assert "gib of memory" in text
    assert "what memory holds" in text
    assert "device" not in text
    assert "host" not in text


def save_cpu_with(memory_gib: float) -> None:
    """Let this machine have been measured: a processor with so much memory and no GPU."""
    memory_bytes = int(memory_gib * 2**30)
    sizes = {"host_memory_bytes": memory_bytes, "device_memory_bytes": memory_bytes}
    keep.save_measurement(measured_here(replace(CPU_ONLY, **sizes)))


def advised_gib(text: str, words: str) -> float:
    (size,) = re.findall(words, " ".join(text.split()))
    return float(size)


def test_the_machine_it_advises_is_one_it_then_plans_for(cli) -> None:
    save_cpu_with(24)
    refused = cli("plan", "--context", "1M")
    save_cpu_with(advised_gib(refused.out, r"a machine with ([0-9.]+)GiB of memory"))
    assert (refused.code, cli("plan", "--context", "1M").code) == (1, 0)


def test_memory_that_was_given_is_advised_in_the_same_words(cli) -> None:
    save_cpu_with(24)
    refused = cli("plan", "--context", "1M", "--device-memory", "20GiB")
    more = advised_gib(refused.out, r"--device-memory ([0-9.]+)GiB, [0-9.]+ GiB more")
    assert "a machine with" not in refused.out
    assert cli("plan", "--context", "1M", "--device-memory", f"{more}GiB").code == 0


@pytest.mark.parametrize("hardware", [(), ("--hardware", "this")])
def test_a_cpu_has_no_host_memory_beside_its_own(cli, hardware) -> None:
    save_cpu_with(24)
    outcome = cli("plan", *hardware, "--host-memory", "1GiB")
    assert (outcome.code, outcome.out) == (2, "")
    assert "there is one memory on a CPU: use --device-memory" in outcome.err


def test_a_machine_without_a_gpu_is_compared_with_others(cli) -> None:
    save_cpu_with(64)
    asked = ("plan", "--context", "16K", "--hardware", "this,h200", "--chunk-tokens", "4K")
    told = " ".join(cli(*asked, "--kv-cache", "packed").out.split())
    assert "this - - 64.0 - bounded " in told
    assert "h200 1 131 512 - resident " in told
    assert "KV on CPU: packed" in told
    refused = cli(*asked, "--gpus", "1")
    assert (refused.code, refused.out) == (2, "")
    assert "--gpus is for machines with a GPU" in refused.err


@pytest.mark.parametrize("measurement", [CPU_ONLY, WITH_GPU], ids=["cpu", "gpu"])
def test_what_was_measured_on_another_machine_is_not_this(cli, measurement) -> None:
    keep.save_measurement(measurement)
    outcome = cli("plan", "--context", "4K")
    said = " ".join(outcome.out.split())
    assert "not measured yet: the last measurement is of another machine" in said
    for verb in ("plan", "roofline"):
        refused = cli(verb, "--hardware", "this")
        assert (refused.code, refused.out) == (2, "")
        assert "another machine, with a processor and 2 threads; run `headinfer" in refused.err
    keep.save_measurement(measured_here(measurement))
    assert "as `headinfer probe` measured it" in cli("plan", "--context", "4K").out


def test_a_damaged_measurement_is_a_note(cli) -> None:
    path = keep.save_measurement(CPU_ONLY)
    path.write_text("{")
    outcome = cli("plan", "--context", "4K")
    assert outcome.code == 0
    (line,) = outcome.error_lines
    assert line.startswith(f"note: {path} cannot be used")


def test_a_cache_folder_that_is_a_file_was_never_probed(cli, monkeypatch, tmp_path) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    outcome = cli("plan", "--context", "4K")
    assert (outcome.code, outcome.err) == (0, "")
    assert "not measured yet" in outcome.out
