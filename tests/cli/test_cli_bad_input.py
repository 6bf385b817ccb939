"""Every mistake a user can make: one line on stderr, exit code 2, no traceback."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from bad_inputs import BY_THE_COMMAND, TABLE
from bad_models import FILES, MODELS
from bad_options import BEFORE_THE_MODEL, Row

from saved_models import CHAT_TEMPLATE, save_llama, save_tokenizer


def check(outcome, *words, code: int = 2) -> None:
    """Compare an outcome with what a mistake must lead to."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    # A busy machine is told of stages that take seconds, before the error.
    lines = [line for line in outcome.error_lines if not line.endswith(" ...")]
    assert len(lines) == 1, outcome.err
    line = lines[0]
    assert line.startswith("headinfer: error: ")
    for word in words:
        assert str(word) in line


@pytest.fixture(scope="session")
def places(llama, tmp_path_factory) -> dict[str, str]:
    """Where what the table's arguments name in braces lies."""
    folder = tmp_path_factory.mktemp("mistakes")
    found = {"new": str(folder / "new.json")}
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    for name, change in MODELS.items():
        shutil.copytree(llama, folder / name)
        change(folder / name)
    return found | {name: str(folder / name) for name in (*FILES, *MODELS)}


def filled(args: tuple[str, ...], places: dict[str, str]) -> list[str]:
    """Return arguments with the places of files and models."""
    return [re.sub(r"{([\w.-]+)}", lambda found: places[found[1]], arg) for arg in args]


def named(row: Row) -> str:
    return " ".join(ascii(arg)[1:25] for arg in row[0])


def never(*_args, **_kwargs):
    raise AssertionError("this mistake must be told earlier")


def test_the_table_is_long_and_has_no_row_twice():
    rows = [args for args, _ in TABLE]
    assert len(rows) >= 200
    assert len(set(rows)) == len(rows)
    assert len(BY_THE_COMMAND) >= 12


@pytest.mark.parametrize("row", TABLE, ids=named)
def test_a_mistake_is_one_line(cli, places, row, monkeypatch):
    from headinfer.engine.engine import Engine

    monkeypatch.setattr(Engine, "attend", never)
    if row in BEFORE_THE_MODEL:
        monkeypatch.setattr("headinfer.cli.generate.load_config", never)
    args, words = row
    check(cli(*filled(args, places)), *words)
    assert not os.path.exists(places["new"])


COMMANDS = """
import gc, json, os, sys
import torch, transformers
from transformers import modeling_utils
from headinfer.cli.main import run

gc.freeze()  # or each of them would look through all of torch at its end
for number, arguments in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["headinfer", *arguments]
    run()
"""


@pytest.fixture(scope="module")
def by_the_command(command, places, tmp_path_factory) -> dict[Row, SimpleNamespace]:
    """What the command itself says of each mistake: in processes of which one imports torch."""
    folder = tmp_path_factory.mktemp("commands")
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        env=command[1],
        input=json.dumps([filled(args, places) for args, _ in BY_THE_COMMAND]),
        capture_output=True,
        cwd=folder,
        text=True,
        timeout=300,
    )
    assert done.stderr == ""
    said = [
        [(folder / f"{number}.{name}").read_text() for name in ("out", "err")]
        for number in range(len(BY_THE_COMMAND))
    ]
    codes = map(int, done.stdout.split())
    return {
        row: SimpleNamespace(code=code, out=out, err=err, error_lines=err.splitlines())
        for row, code, (out, err) in zip(BY_THE_COMMAND, codes, said, strict=True)
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="one import of torch serves all")
@pytest.mark.parametrize("row", BY_THE_COMMAND, ids=named)
def test_a_mistake_is_one_line_of_the_command(by_the_command, row):
    check(by_the_command[row], *row[1])


@pytest.mark.slow
def test_a_mistake_is_one_line_of_a_process(process, places):
    (row,) = (row for row in BY_THE_COMMAND if "{template-type}" in row[0])
    check(process(*filled(row[0], places)), *row[1])


UNREADABLE = Path("/proc/self/mem")
"""A file that may be opened and not read, by root neither."""


@pytest.mark.skipif(not UNREADABLE.exists(), reason="only Linux has /proc/self/mem")
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_files_of_a_model_that_cannot_be_read(cli, llama, tmp_path, name):
    model = shutil.copytree(llama, tmp_path / "model")
    (model / name).unlink()
    (model / name).symlink_to(UNREADABLE)
    check(cli("generate", "--model", model, "-p", "w1"), f"{name} cannot be read")


@pytest.mark.skipif(not UNREADABLE.exists(), reason="only Linux has /proc/self/mem")
def test_a_prompt_that_cannot_be_read(cli):
    check(cli("generate", "--prompt-file", UNREADABLE), "/proc/self/mem", "cannot be read")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read(cli, tmp_path):
    tmp_path.chmod(0)
    check(cli("generate", "--model", tmp_path, "-p", "w1"), "may not be read", "permissions")


def test_empty_stdin(cli):
    check(cli("generate", stdin=""), "stdin", "empty", "--prompt-file")


@pytest.mark.parametrize(
    "architectures",
    [["BertForMaskedLM"], ["BertLMHeadModel"], None],
    ids=["masked", "head", "none"],
)
def test_encoders(cli, tmp_path, architectures):
    from transformers import BertConfig

    BertConfig(architectures=architectures).save_pretrained(tmp_path)
    check(cli("generate", "--model", tmp_path, "-p", "w1"), "not a causal language model")


def test_encoder_decoders(cli, tmp_path):
    from transformers import T5Config

    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    check(cli("generate", "--model", tmp_path, "-p", "w1"), "encoder-decoder")


def test_models_without_attention(cli, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, chat=False)
    check(cli("generate", "--model", tmp_path, "-p", "w1"), "MambaForCausalLM")


def test_cuda_where_there_is_none(cli, llama, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = cli("generate", "--model", llama, "-p", "w1", "--device", "cuda")
    check(done, "CUDA is not available", "--device cpu")


def test_host_memory_too_small_for_the_cache(cli, tmp_path, monkeypatch):
    from headinfer.engine.engine import Engine

    monkeypatch.setattr(Engine, "attend", never)
    model = save_llama(tmp_path, positions=2**20)
    args = ("--model", model, "-p", "w1 w2", "-n", 10_000, "--host-memory", "1MiB", "--quiet")
    # 2 layers x 2 heads x 2 x 8 elements x 4 bytes = 256 bytes a token
    check(cli("generate", *args), "2.44 MiB", "1.00 MiB")


@pytest.mark.parametrize("chat", [False, True], ids=["raw", "chat"])
def test_a_text_that_cannot_fit_is_not_tokenised(cli, tmp_path, monkeypatch, chat):
    import transformers

    from headinfer.demo.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    tokenizer.save_pretrained(save_llama(tmp_path, vocab_size=len(tokenizer)))
    book = tmp_path / "book.txt"
    book.write_text("The strongbox opens. " * 60_000)
    args = ("generate", "--model", tmp_path, "--prompt-file", book, "--quiet")
    with monkeypatch.context() as patched:
        patched.setattr(transformers.PreTrainedTokenizerBase, "__call__", never)
        told = ("the prompt has at least 84,00", "512 positions", "--allow-long-prompt")
        check(cli(*args), *told)
    book.write_text("The strongbox opens. " * 400)  # may fit, and does not
    check(cli(*args), "the prompt has ", "512 positions", "--allow-long-prompt")


def test_settings_that_transformers_refuses(cli, llama):
    args = ("--num-beams", 200, "--quiet", "-n", 4)  # more beams than half the vocabulary
    outcome = cli("generate", "--model", llama, "-p", "w1", *args)
    assert "Traceback" not in outcome.err
    assert len(outcome.error_lines) <= 1


def test_a_value_error_before_the_model_runs_is_one_line(cli, llama, monkeypatch):
    import transformers

    def refuse(*_args, **_kwargs):
        raise ValueError("these settings\nclash")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", refuse)
    check(cli("generate", "--model", llama, "-p", "w1", "--quiet"), "these settings clash")


def test_unexpected_errors_are_one_line_with_a_hint(cli, llama, monkeypatch):
    import headinfer.api

    def fail(*_args, **_kwargs):
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(headinfer.api, "attach", fail)
    args = ("generate", "--model", llama, "-p", "w1")
    check(cli(*args), "ZeroDivisionError: by zero", "HEADINFER_DEBUG=1", code=1)
    monkeypatch.setenv("HEADINFER_DEBUG", "1")
    outcome = cli(*args)
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert outcome.error_lines[-1].startswith("headinfer: error: ")


def test_debug_variable_is_parsed_strictly(cli, monkeypatch):
    monkeypatch.setenv("HEADINFER_DEBUG", "yes")
    check(cli("generate", "-p", "w1"), "HEADINFER_DEBUG must be 0 or 1, not 'yes'")
