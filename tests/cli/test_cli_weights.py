"""Checkpoints that lack weights, hold others, or are damaged; and logits that are no numbers."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli_bad_input import check
from transformers import AutoModelForCausalLM

from saved_models import save_llama

GREEDY = ("--no-do-sample", "-n", 4)


@pytest.fixture
def changed(llama, tmp_path):
    """Make a copy of the tiny Llama with other values in its config."""

    def change(**config):
        folder = tmp_path / "changed"
        shutil.copytree(llama, folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return change


def change_weights(folder, **weights) -> None:
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **weights}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, file, metadata={"format": "pt"})


def test_more_layers_than_the_checkpoint_has(cli, changed):
    model = changed(num_hidden_layers=12)
    done = cli("generate", "--model", model, "-p", "w1", *GREEDY)
    check(done, "lacks 90 weights (model.layers.2.input_layernorm.weight, ", "random", "config")


def test_a_weight_that_the_config_does_not_tie(cli, changed):
    model = changed(tie_word_embeddings=False)
    change_weights(model, **{"lm_head.weight": None})
    check(cli("generate", "--model", model, "-p", "w1"), "lacks 1 weight (lm_head.weight)")


def test_tied_weights_are_not_missing(cli, changed):
    model = changed(tie_word_embeddings=True)
    change_weights(model, **{"lm_head.weight": None})
    done = cli("generate", "--model", model, "-p", "w1", *GREEDY)
    assert done.code == 0, done.err
    assert "note" not in done.err


def test_weights_of_another_shape(cli, changed):
    done = cli("generate", "--model", changed(intermediate_size=64), "-p", "w1")
    check(done, "6 weights", "layers.0.mlp.down_proj.weight is [32, 48] and not [32, 64]")


def test_weights_without_use_are_noted(cli, changed):
    args = ("generate", "--model", changed(num_hidden_layers=1), "-p", "w1", *GREEDY)
    done = cli(*args)
    assert done.code == 0, done.err
    assert "note: the model has no use for 9 weights (model.layers.1." in done.err
    assert cli(*args, "--quiet").err == ""


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999], ids=str)
def test_a_file_that_is_cut_short(cli, changed, keep):
    model = changed()
    file = model / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data) if 0 < keep < 1 else keep)])
    check(cli("generate", "--model", model, "-p", "w1"), "model.safetensors is damaged or cut")


@pytest.mark.parametrize("kept_bytes", [0, 20_000])
def test_a_pickle_that_is_cut_short(cli, llama, changed, kept_bytes):
    model = changed()
    (model / "model.safetensors").unlink()
    file = model / "pytorch_model.bin"
    torch.save(load_file(llama / "model.safetensors"), file)
    file.write_bytes(file.read_bytes()[:kept_bytes])
    check(cli("generate", "--model", model, "-p", "w1"), "pytorch_model.bin is damaged or cut")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_in_place_of_weights(cli, changed, name):
    model = changed()
    (model / "model.safetensors").unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 999999\n"
    (model / name).write_text(pointer)
    check(cli("generate", "--model", model, "-p", "w1"), "git lfs pull")


@pytest.fixture
def sharded(llama, changed):
    model = changed()
    (model / "model.safetensors").unlink()
    whole = AutoModelForCausalLM.from_pretrained(llama)
    whole.save_pretrained(model, max_shard_size="20KB")
    assert len(list(model.glob("*.safetensors"))) > 2
    return model


def test_shards_that_are_missing_damaged_or_not_listed(cli, sharded):
    args = ("generate", "--model", sharded, "-p", "w1", *GREEDY)
    assert cli(*args).code == 0
    shard = sorted(sharded.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    check(cli(*args), f"{shard.name} is damaged or cut short")
    shard.unlink()
    check(cli(*args), f"{shard.name} is missing", "index.json")
    (sharded / "model.safetensors.index.json").write_text("{")
    check(cli(*args), "model.safetensors.index.json is damaged")


@pytest.fixture
def with_strays(changed):
    """A model with files of other sets, which transformers does not load."""
    model = changed()
    shards = {"weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(shards))
    (model / "adapter_model.safetensors").touch()
    (model / "training_args.bin").touch()
    return model


def test_the_fault_is_in_a_file_that_is_loaded(cli, with_strays):
    assert cli("generate", "--model", with_strays, "-p", "w1", *GREEDY).code == 0
    file = with_strays / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20_000])
    done = cli("generate", "--model", with_strays, "-p", "w1")
    check(done, "model.safetensors is damaged or cut short")


OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("strays", [False, True], ids=["alone", "strays"])
def test_weights_for_which_memory_lacks(cli, llama, with_strays, monkeypatch, error, strays):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    model = with_strays if strays else llama
    check(cli("generate", "--model", model, "-p", "w1"), "error: out of memory", code=1)


@pytest.mark.parametrize("what", ["file", "folder", "weights"])
def test_gguf(cli, changed, tmp_path, what):
    folder = changed() if what == "weights" else tmp_path / "empty"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").unlink(missing_ok=True)
    file = folder / "model.gguf"
    file.write_bytes(b"GGUF")
    check(cli("generate", "--model", file if what == "file" else folder, "-p", "w1"), "GGUF")


@pytest.mark.parametrize("way", [(), ("--num-beams", 2), ("--prompt-lookup-num-tokens", 3)])
def test_logits_that_are_no_numbers(cli, changed, way):
    model = changed()
    change_weights(model, **{"model.norm.weight": torch.full((32,), torch.nan)})
    done = cli("generate", "--model", model, "-p", "w1 w2 w1", *GREEDY, *way, "--json")
    assert done.code == 2
    assert json.loads(done.out)["finish_reason"] == "error"
    assert json.loads(done.out)["text"] == ""
    assert "logits for new token 1 are NaN or infinite" in done.error_lines[-1]
    assert "weights are damaged" in done.error_lines[-1]


def test_logits_that_overflow_when_sampled(cli, changed):
    model = changed(tie_word_embeddings=False)
    head = load_file(model / "model.safetensors")["lm_head.weight"]
    change_weights(model, **{"lm_head.weight": head * 1e5})
    done = cli("generate", "--model", model, "-p", "w1", "--top-k", 5, "--dtype", "float16")
    assert (done.code, done.out) == (2, "")
    assert "overflow in float16" in done.error_lines[-1]
    assert "--dtype bfloat16 or float32" in done.error_lines[-1]
    assert cli("generate", "--model", model, "-p", "w1", *GREEDY, "--dtype", "bfloat16").code == 0


def test_text_before_such_logits_is_kept(cli, llama, prompt, monkeypatch):
    from transformers import LlamaForCausalLM

    forward, calls = LlamaForCausalLM.forward, []

    def fail_late(self, *args, **kwargs):
        calls.append(1)
        output = forward(self, *args, **kwargs)
        output.logits *= 1 if len(calls) < 4 else torch.nan
        return output

    args = ("generate", "--model", llama, "-p", prompt, "--no-do-sample", "-n", 20, "--no-capture")
    expected = cli(*args).out.split()[:3]
    monkeypatch.setattr(LlamaForCausalLM, "forward", fail_late)
    done = cli(*args)
    assert done.code == 2
    assert done.out.split() == expected
    assert "new token 4" in done.error_lines[-1]
    assert "prefill" in done.err


def test_a_suppressed_vocabulary_is_no_fault_of_numbers(cli, tmp_path, prompt):
    model = save_llama(tmp_path)
    file = model / "generation_config.json"
    own = json.loads(file.read_text()) | {"suppress_tokens": list(range(2, 90))}
    file.write_text(json.dumps(own))
    assert cli("generate", "--model", model, "-p", prompt, *GREEDY).code == 0
