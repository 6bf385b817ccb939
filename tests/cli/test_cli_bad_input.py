"""Every mistake a user can make: one line on stderr, exit code 2, no traceback."""

import json
import shutil

import pytest

from saved_models import save_llama, save_tokenizer


def check(outcome, *words, code: int = 2) -> None:
    """Compare an outcome with what a mistake must lead to."""
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert len(outcome.error_lines) == 1, outcome.err
    line = outcome.error_lines[0]
    assert line.startswith("headinfer: error: ")
    for word in words:
        assert str(word) in line


OPTION_MISTAKES = {
    "memory size": (("--device-memory", "24 gigs"), "24 gigs", "24GiB"),
    "host memory size": (("--host-memory", "lots"), "lots"),
    "size without a unit": (("--device-memory", "24"), "--device-memory", "did you mean '24GiB'?"),
    "host size without a unit": (("--host-memory", "8.5"), "--host-memory", "'8.5GiB'"),
    "zero memory": (("--device-memory", "0"), "positive"),
    "tile heads of 0": (("--tile-heads", "0"), "--tile-heads", "'0'"),
    "tile tokens of 0": (("--tile-tokens", "0"), "--tile-tokens", "'0'"),
    "chunk of 0": (("--chunk-tokens", "0"), "--chunk-tokens", "'0'"),
    "chunk of all": (("--chunk-tokens", "all"), "--chunk-tokens"),
    "tile of words": (("--tile-tokens", "many"), "many"),
    "temperature of 0": (("--do-sample", "--temperature", "0"), "--temperature", "--no-do-sample"),
    "temperature below 0": (("--temperature", "-1"), "--temperature"),
    "top-p above 1": (("--top-p", "1.5"), "--top-p", "at most 1"),
    "min-p above 1": (("--min-p", "2"), "--min-p"),
    "top-k below 0": (("--top-k", "-1"), "--top-k"),
    "no beams": (("--num-beams", "0"), "--num-beams"),
    "no new tokens": (("--max-new-tokens", "0"), "--max-new-tokens"),
    "repetition penalty of 0": (("--repetition-penalty", "0"), "--repetition-penalty"),
    "temperature when greedy": (("--no-do-sample", "--temperature", "0.5"), "--temperature"),
    "lookup with beams": (("--prompt-lookup-num-tokens", "3", "--num-beams", "2"), "beams"),
    "unknown option": (("--no-such-option",), "--no-such-option"),
    "unknown device": (("--device", "tpu"), "tpu"),
    "prompt twice": (("-p", "w2"), "--prompt/-p", "2 times"),
    "seed twice": (("--seed", "1", "--seed", "1"), "--seed", "2 times"),
    "yes and no": (("--do-sample", "--no-do-sample"), "--do-sample", "2 times"),
    "stdin twice": (("-f", "-", "-f", "-"), "--prompt-file -", "stdin"),
    "share above 1": (("--host-attention", "2"), "--host-attention", "from 0 to 1"),
    "threads without end": (("--threads", "100000"), "--threads", "100000 is more than"),
    "seed beyond 64 bits": (("--seed", "99999999999999999999999"), "--seed", "2**64 - 1"),
    "seed far below 0": (("--seed", "-9223372036854775809"), "--seed", "-2**63"),
    "endless temperature": (("--temperature", "inf"), "--temperature", "finite"),
    "endless penalty": (("--repetition-penalty", "inf"), "--repetition-penalty", "finite"),
    "length penalty that is no number": (
        ("--num-beams", "2", "--length-penalty", "nan"),
        "--length-penalty",
        "finite",
    ),
    "share that is no number": (("--top-p", "nan"), "--top-p", "finite"),
    "lookup by both names": (("--prompt-lookup", "3", "--prompt-lookup-num-tokens", "3"), "one"),
    "number of words": (("--top-k", "some"), "--top-k"),
}


@pytest.mark.parametrize("name", OPTION_MISTAKES)
def test_options(cli, name, monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("a wrong option must be told before anything is loaded")

    monkeypatch.setattr("headinfer.cli.generate.load_config", never)
    args, *words = OPTION_MISTAKES[name]
    check(cli("generate", "-p", "w1", *args), *words)


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "No such file"), (b"", "empty"), (b" \n\t", "empty"), (b"ab\xff", "0xff at offset 2")],
    ids=["missing", "empty", "blank", "latin-1"],
)
def test_prompt_files(cli, tmp_path, content, word):
    file = tmp_path / "book.txt"
    if content is not None:
        file.write_bytes(content)
    check(cli("generate", "--prompt-file", file), word, "book.txt")


def test_prompt_file_that_is_a_folder(cli, tmp_path):
    check(cli("generate", "--prompt-file", tmp_path), "cannot be read")


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(cli, prompt):
    check(cli("generate", "--prompt", prompt), "empty")


def test_empty_stdin(cli):
    check(cli("generate", stdin=""), "stdin", "empty", "--prompt-file")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "nobody/nothing", "a name", ""])
@pytest.mark.parametrize("flags", [(), ("--local-files-only",)], ids=["offline", "local"])
def test_models_that_do_not_exist(cli, name, flags):
    check(cli("generate", "--model", name, "-p", "w1", *flags), repr(name))


def test_folder_without_a_model(cli, tmp_path):
    check(cli("generate", "--model", tmp_path, "-p", "w1"), "no config.json")


def test_unreadable_config(cli, tmp_path):
    (tmp_path / "config.json").write_text("{")
    check(cli("generate", "--model", tmp_path, "-p", "w1"), "cannot be loaded")


def test_unknown_model_type(cli, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    check(cli("generate", "--model", tmp_path, "-p", "w1"), "no-such-type")


def test_model_without_tokenizer(cli, llama, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama / name, tmp_path)
    check(cli("generate", "--model", tmp_path, "-p", "w1"), "tokenizer")


def test_model_without_weights(cli, llama, tmp_path):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    check(cli("generate", "--model", tmp_path, "-p", "w1"), "model")


def test_damaged_weights(cli, llama, tmp_path):
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    check(cli("generate", "--model", tmp_path, "-p", "w1"), "cannot be loaded")


@pytest.mark.parametrize(
    "architectures",
    [["BertForMaskedLM"], ["BertLMHeadModel"], None],
    ids=["masked", "head", "none"],
)
def test_encoders(cli, tmp_path, architectures):
    from transformers import BertConfig

    BertConfig(architectures=architectures).save_pretrained(tmp_path)
    check(cli("generate", "--model", tmp_path, "-p", "w1"), "not a causal language model")


def test_classifiers_of_causal_families(cli, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(architectures=["LlamaForSequenceClassification"]).save_pretrained(tmp_path)
    check(cli("generate", "--model", tmp_path, "-p", "w1"), "LlamaForSequenceClassification")


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


def test_prompt_longer_than_the_positions(cli, llama):
    done = cli("generate", "--model", llama, "-p", " ".join(["w1"] * 513))
    check(done, "513", "512", "--allow-long-prompt")


def test_budget_below_the_weights(cli, llama):
    done = cli("generate", "--model", llama, "-p", "w1", "--device-memory", "4KiB")
    check(done, "below the weights", "4.00 KiB", "give at least")


def test_more_tile_heads_than_there_are(cli, llama):
    done = cli("generate", "--model", llama, "-p", "w1", "--tile-heads", "3")
    check(done, "--tile-heads is 3", "2 KV heads")


def test_cuda_where_there_is_none(cli, llama, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = cli("generate", "--model", llama, "-p", "w1", "--device", "cuda")
    check(done, "CUDA is not available", "--device cpu")


def test_host_memory_too_small_for_the_cache(cli, tmp_path, monkeypatch):
    from headinfer.engine.engine import Engine

    def never(*_args, **_kwargs):
        raise AssertionError("host memory must be checked before prefill")

    monkeypatch.setattr(Engine, "attend", never)
    model = save_llama(tmp_path, positions=2**20)
    args = ("--model", model, "-p", "w1 w2", "-n", 10_000, "--host-memory", "1MiB", "--quiet")
    # 2 layers x 2 heads x 2 x 8 elements x 4 bytes = 256 bytes a token
    check(cli("generate", *args), "2.44 MiB", "1.00 MiB")


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


def test_chat_templates_that_fail(cli, tmp_path):
    from transformers import AutoTokenizer

    save_llama(tmp_path, chat=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.chat_template = "{{ raise_exception('system first') }}"
    tokenizer.save_pretrained(tmp_path)
    check(cli("generate", "--model", tmp_path, "-p", "w1"), "system first", "--raw")


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


def test_as_a_process(process):
    check(process("generate", "--model", "/no/such/folder", "-p", "w1"))
