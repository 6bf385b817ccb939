"""`headinfer generate --tensor-parallel`, as torchrun starts it."""

import subprocess
import sys
from pathlib import Path

import pytest
from launching import torchrun

import headinfer
from headinfer.cli.main import app
from saved_models import save_llama

GENERATE = ["generate", "--tensor-parallel", "--device", "cpu", "-p", "w1 w2 w3 w4 w5 w6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("split") / "llama"
    save_llama(made, num_attention_heads=4, num_key_value_heads=2)
    return made


def lines_of_ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("headinfer:")]


@pytest.mark.slow
def test_one_rank_prints_what_the_whole_model_says(folder) -> None:
    asked = ["--model", str(folder), "-n", "12", "--do-sample", "--seed", "7"]
    done = torchrun("-m", "headinfer", *GENERATE, *asked)
    assert done.returncode == 0, done.stderr
    import torch

    torch.manual_seed(7)
    wanted = headinfer.generate(
        str(folder), "w1 w2 w3 w4 w5 w6", max_new_tokens=12, do_sample=True, device="cpu"
    )
    assert done.stdout.strip() == "".join(record.text for record in wanted).strip()
    assert done.stderr.count("one of 2 ranks, with KV heads of a layer: 1") == 1


def test_a_rank_that_fails_ends_all_with_one_message(folder) -> None:
    program = str(Path(__file__).parent / "failing_program.py")
    done = torchrun(program, *GENERATE, "--model", str(folder), "-n", "12", "1 answer")
    assert done.returncode != 0
    (line,) = lines_of_ours(done.stderr)
    assert line.startswith("headinfer: error: LookupError: something nobody foresaw")


@pytest.mark.slow
def test_a_disk_that_fails_one_rank_ends_all_with_one_message(folder, tmp_path) -> None:
    program = str(Path(__file__).parent / "failing_program.py")
    words = " ".join(f"w{at % 90}" for at in range(480))
    asked = ["generate", "--tensor-parallel", "--device", "simulated", "-p", words, "-n", "12"]
    below = ["--disk-cache", str(tmp_path), "--host-memory", "340KiB", "--tile-tokens", "64"]
    command = [*asked, *below, "--tile-heads", "1", "--chunk-tokens", "90", "--model", str(folder)]
    whole = torchrun("-m", "headinfer", *command)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("w") > 5
    assert "tokens on disk" in whole.stderr
    done = torchrun(program, *command, "1 disk")
    assert done.returncode != 0
    assert "exitcode  : 2" in done.stderr
    assert done.stdout == ""
    (line,) = lines_of_ours(done.stderr)
    assert f"disk-cache '{tmp_path}' has no room for" in line


@pytest.mark.slow
def test_ranks_that_cannot_share_the_heads_say_so_once(tmp_path) -> None:
    save_llama(tmp_path, num_attention_heads=4, num_key_value_heads=1)
    done = torchrun("-m", "headinfer", *GENERATE, "--model", str(tmp_path))
    assert done.returncode != 0
    assert "exitcode  : 2" in done.stderr
    (line,) = lines_of_ours(done.stderr)
    assert "has 1 KV head in a layer, which 2 ranks cannot share evenly" in line
    assert done.stdout == ""


def test_a_process_without_torchrun_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        app(GENERATE)
    assert ended.value.code == 2
    (line,) = lines_of_ours(capsys.readouterr().err)
    assert "start it by `torchrun" in line


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["generate", "-p", "x"], "add --tensor-parallel"),
        (["plan"], "only generate has ranks"),
        (["generate", "--tensor-parallel", "-p", "x", "--load-in", "4bit"], "--load-in cannot be"),
        (["generate", "--tensor-parallel", "-p", "x", "--adapter", "a"], "--adapter cannot be"),
    ],
)
def test_what_ranks_do_not_do_is_refused_by_each(monkeypatch, capsys, given, said) -> None:
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit) as ended:
        app(given)
    assert ended.value.code == 2
    (line,) = lines_of_ours(capsys.readouterr().err)
    assert said in line


def test_the_package_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "headinfer", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"headinfer {headinfer.__version__}"
