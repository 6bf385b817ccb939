"""`headinfer generate` on good input."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
import torch

from headinfer.generation.text import TextCollector
from headinfer.units import format_bytes

GREEDY = ("--no-do-sample", "-n", 20)


def test_text_is_what_stock_transformers_gives(cli, llama, prompt, reference):
    done = cli("generate", "--model", llama, "--prompt", prompt, *GREEDY)
    assert done.code == 0
    assert done.out == reference(prompt, do_sample=False, max_new_tokens=20) + "\n"


def test_json_has_the_streamed_text_and_what_was_measured(cli, llama, prompt):
    common = ("generate", "--model", llama, "-p", prompt, *GREEDY, "--device", "simulated")
    common += ("--tile-tokens", 16, "--chunk-tokens", 32, "--tile-heads", 1)
    streamed = cli(*common)
    result = json.loads(cli(*common, "--json").out)
    assert result["text"] + "\n" == streamed.out
    assert result["text"]
    assert result["finish_reason"] in ("stop", "length")
    assert result["prompt_tokens"] == 70
    assert result["new_tokens"] <= 20
    assert result["plan"]["tile_tokens"] == 16
    assert result["plan"]["chunk_tokens"] == 32
    assert result["stats"]["prefill_tokens"] == 70
    assert result["stats"]["bytes_to_device"] > 0
    assert result["stats"]["peak_device_kv_bytes"] == result["plan"]["arena_bytes"]


def test_all_but_text_goes_to_stderr(cli, llama, prompt):
    done = cli("generate", "--model", llama, "-p", prompt, *GREEDY, "--device", "simulated")
    for word in ("tiles of", "CPU memory", "prefill", "decode", "link", "KV in GPU memory"):
        assert word in done.err
        assert word not in done.out


def test_a_cpu_has_no_lines_of_tiles_and_links(cli, llama, prompt):
    done = cli("generate", "--model", llama, "-p", prompt, *GREEDY, "--device", "cpu")
    assert "prefill" in done.err
    for word in ("tiles", "link", "standard"):
        assert word not in done.err


def test_memory_for_an_answer_that_ended_early_is_no_waste(cli, llama, prompt):
    args = ("generate", "--model", llama, "-p", prompt, "--no-do-sample", "-n", 300)
    result = json.loads(cli(*args, "--json").out)
    assert result["new_tokens"] < 100
    used, held = (result["stats"][name] for name in ("standard_kv_bytes", "host_kv_bytes"))
    (line,) = (line for line in cli(*args).err.splitlines() if line.startswith("KV in CPU"))
    assert line.split(maxsplit=4)[4] == f"{format_bytes(used)}, of {format_bytes(held)} set aside"


def test_quiet_says_nothing(cli, llama, prompt):
    done = cli("generate", "--model", llama, "-p", prompt, *GREEDY, "--quiet")
    assert done.code == 0
    assert done.out
    assert done.err == ""


def test_warnings_of_the_library_are_notes(cli, llama, prompt):
    args = ("generate", "--model", llama, "-p", prompt, *GREEDY, "--host-memory", "900TiB")
    (note,) = (line for line in cli(*args).error_lines if "900" in line)
    assert note.startswith("note: --host-memory 900.00 TiB is more than the ")
    assert cli(*args, "--quiet").err == ""
    (note,) = (
        line
        for line in cli(*args, "--device", "cpu", "--resident-tokens", "4K").error_lines
        if "resident" in line
    )
    assert note.startswith("note: --resident-tokens 4096 has no effect on the CPU")
    (note,) = (line for line in cli(*args[:-2], "--kv-cache", "int8").error_lines if "int8" in line)
    assert note.startswith("note: --kv-cache int8 has no effect on the CPU")


def test_one_is_singular(cli, llama):
    done = cli("generate", "--model", llama, "-p", "w1", "--no-do-sample", "-n", 2)
    assert "prefill           1 token in" in done.err
    assert "decode            1 token in" in done.err
    assert " 1 tokens" not in done.err


@pytest.mark.slow
def test_transformers_is_silent(process, llama, prompt):
    done = process("generate", "--model", llama, "-p", prompt, "-n", 3, "--quiet")
    assert done.code == 0
    assert done.err == ""


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
def test_other_ways_of_generating(cli, llama, prompt, reference, settings):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    done = cli("generate", "--model", llama, "-p", prompt, *GREEDY, *flags)
    expected = reference(prompt, do_sample=False, max_new_tokens=20, **settings)
    assert (done.code, done.out) == (0, expected + "\n")


def test_an_assistant_drafts(cli, llama, prompt):
    args = ("generate", "--model", llama, "-p", prompt, *GREEDY)
    plain = cli(*args)
    done = cli(*args, "--assistant", llama, "--draft", 3)
    assert (done.code, done.out) == (0, plain.out)
    assert re.search(r"drafts +\d+ of \d+ accepted, \d\.\d a verification", done.err)
    assert re.search(r"assistant +read the prompt in \d", done.err)
    assert re.search(r"  the assistant: weights .*B, KV and activations .*B \(estimate\)", done.err)
    off = cli(*args, "--draft", "off")
    assert (off.code, off.out) == (0, plain.out)
    assert not re.search("drafts|assistant", off.err)
    missing = cli(*args, "--assistant", "nowhere/at-all", "--local-files-only")
    assert (missing.code, len(missing.error_lines)) == (2, 1)
    assert "nowhere/at-all" in missing.err


def test_the_embedded_model_is_an_assistant_by_its_name(cli, llama, prompt):
    """It has another tokenizer, which is told once it is found."""
    done = cli("generate", "--model", llama, "-p", prompt, *GREEDY, "--assistant", "demo")
    assert done.code == 2
    assert "they have not the same tokenizer" in done.error_lines[-1]


def test_a_model_drafts_itself(cli, llama):
    words = " ".join(f"w{number * 7 % 90}" for number in range(1100))
    args = ("generate", "--model", llama, "-p", words, *GREEDY, "--json", "--allow-long-prompt")
    plain, drafted = json.loads(cli(*args).out), json.loads(cli(*args, "--draft", 3).out)
    assert drafted["text"] == plain["text"]
    assert (plain["plan"]["draft_tokens"], plain["stats"]["verifications"]) == (0, 0)
    assert (drafted["plan"]["draft_tokens"], drafted["stats"]["drafted_tokens"] > 0) == (256, True)


def test_sampling_repeats_with_a_seed(cli, llama, prompt):
    def sample(seed: int) -> str:
        return cli(
            "generate",
            "--model",
            llama,
            "-p",
            prompt,
            "--temperature",
            1.5,
            "--seed",
            seed,
            "-n",
            12,
        ).out

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize(
    "args",
    [("-p", "w1 w2"), ("-f", "FILE"), ("-f", "-"), (), ("-f", "FILE", "-p", "w3")],
    ids=["prompt", "file", "dash", "pipe", "both"],
)
def test_where_prompts_come_from(cli, llama, tmp_path, args):
    file = tmp_path / "prompt.txt"
    file.write_text("w1 w2\n", encoding="utf-8")
    args = [file if arg == "FILE" else arg for arg in args]
    done = cli("generate", "--model", llama, *args, *GREEDY, "--json", stdin="w1 w2\n")
    assert json.loads(done.out)["prompt_tokens"] == 2 + ("w3" in args)


def test_file_comes_before_the_prompt_with_a_blank_line_between(tmp_path):
    from headinfer.cli.prompt import read_prompt

    file = tmp_path / "book.txt"
    file.write_bytes(b"\xef\xbb\xbfOnce.\r\n\r\n")
    assert read_prompt("Who?\n", [str(file)]) == "Once.\n\nWho?"


def test_several_files_come_in_order(tmp_path):
    from headinfer.cli.prompt import read_prompt

    files = []
    for text in ("one\n\n", "two", "three\r\n"):
        files.append(str(tmp_path / f"{len(files)}.txt"))
        (tmp_path / files[-1]).write_bytes(text.encode())
    assert read_prompt("Who?", files) == "one\ntwo\nthree\n\nWho?"
    assert read_prompt(None, [files[2], files[0]]) == "three\none"


def test_several_files_are_taken(cli, llama, tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("w1 w2\n")
    args = ("-f", file, "-f", "-", "-f", file, "-p", "w3", *GREEDY, "--json")
    done = cli("generate", "--model", llama, *args, stdin="w4 w5 w6\n")
    assert json.loads(done.out)["prompt_tokens"] == 8


def test_chat_template_is_used_unless_raw(cli, chat_llama):
    def tokens(*flags) -> int:
        done = cli("generate", "--model", chat_llama, "-p", "w1 w2", *GREEDY, "--json", *flags)
        return json.loads(done.out)["prompt_tokens"]

    assert tokens() == 4
    assert tokens("--raw") == 2


def test_long_prompts_can_be_allowed(cli, llama):
    text = " ".join(["w1"] * 600)
    done = cli("generate", "--model", llama, "-p", text, "-n", 2, "--allow-long-prompt")
    assert done.code == 0


def test_answers_beyond_the_positions_are_noted(cli, llama):
    text = " ".join(["w1"] * 510)
    done = cli("generate", "--model", llama, "-p", text, "-n", 8)
    assert done.code == 0
    assert "note: prompt and answer may reach 518 tokens" in done.err


def test_host_memory_is_what_was_planned(cli, llama, prompt):
    done = cli("generate", "--model", llama, "-p", prompt, *GREEDY, "--json")
    result = json.loads(done.out)
    assert result["stats"]["host_kv_bytes"] == result["plan"]["kv_host_bytes"]


def test_a_failure_on_the_way_loses_no_text(cli, llama, prompt, monkeypatch):
    from headinfer.engine.engine import Engine

    attend, calls = Engine.attend, []

    def fail_late(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 12:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried\nto allocate")
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "attend", fail_late)
    done = cli("generate", "--model", llama, "-p", prompt, *GREEDY, "--no-capture")
    assert done.code == 1
    assert done.out.strip()
    assert "prefill" in done.err
    assert "error: out of memory" in done.error_lines[-1]
    calls.clear()
    result = cli("generate", "--model", llama, "-p", prompt, *GREEDY, "--no-capture", "--json")
    assert json.loads(result.out)["finish_reason"] == "error"
    assert json.loads(result.out)["text"] + "\n" == done.out


def _interrupted(command, *args) -> tuple[int, str, str]:
    running = subprocess.Popen(
        [*command[0], *map(str, args)],
        env=command[1],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    first = os.read(running.stdout.fileno(), 1)
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=180)
    return running.returncode, (first + out).decode(), err.decode()


def test_ctrl_c_keeps_the_text_so_far(command, endless_llama, prompt):
    args = ("generate", "--model", endless_llama, "-p", prompt, "-n", 100_000, "--no-do-sample")
    code, out, err = _interrupted(command, *args)
    assert code == 130
    assert len(out.split()) > 1
    assert out.endswith("\n")
    assert "decode" in err
    assert err.splitlines()[-1] == "headinfer: interrupted"
    assert "Traceback" not in err


class _Characters:
    """A tokenizer with a token for each byte of UTF-8."""

    def decode(self, ids, **_settings) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_streamed_characters_are_whole_and_all_there():
    pieces: list[str] = []
    collector = TextCollector(_Characters(), pieces.append)
    collector.put(_Ids([1, 2, 3]))
    for byte in "naïve café 東京\n".encode():
        collector.put(_Ids([byte]))
    collector.add([0xE6])
    collector.end()
    collector.end()
    assert "".join(pieces) == collector.text == "naïve café 東京\n\N{REPLACEMENT CHARACTER}"
    assert "東" in pieces


class _Ids(list):
    def flatten(self):
        return self

    def tolist(self):
        return list(self)


def test_a_trace_shows_each_kind_of_work_on_its_line(cli, llama, prompt, tmp_path):
    path = tmp_path / "trace.json"
    options = ("--resident-tokens", 8, "--host-attention", 0.5, "--tile-tokens", 16)
    outcome = cli(
        *("generate", "--model", llama, "--raw", "--prompt", prompt, "--device", "simulated"),
        *("--max-new-tokens", 12, "--trace", path, *options),
    )
    assert outcome.code == 0, outcome.err
    events = json.loads(path.read_text())["traceEvents"]
    lines = {
        event["tid"]: event["args"]["name"]
        for event in events
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    shown = {lines[event["tid"]] for event in events if event["ph"] == "X"}
    assert shown >= {"copy-in", "attention", "host attention", "projections"}
    slices = [event for event in events if event["ph"] == "X"]
    assert all(event["dur"] >= 0 for event in slices)
    on_host = [event for event in slices if event["name"] == "host attention"]
    others = [event for event in slices if event["name"] != "host attention"]
    first = min(event["ts"] for event in others)
    last = max(event["ts"] + event["dur"] for event in others)
    assert len(on_host) > 2
    assert all(first < event["ts"] < event["ts"] + event["dur"] < last for event in on_host)


def test_a_trace_that_cannot_be_written_is_refused_at_once(cli, tmp_path):
    outcome = cli("generate", "--prompt", "x", "--trace", tmp_path / "nowhere" / "trace.json")
    assert outcome.code == 2
    assert "--trace" in outcome.err
    assert "no folder" in outcome.err


def test_threads_are_as_many_as_asked_for(cli, llama, prompt):
    before = torch.get_num_threads()
    try:
        done = cli("generate", "--model", llama, "--prompt", prompt, *GREEDY, "--threads", 3)
        assert done.code == 0, done.err
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
