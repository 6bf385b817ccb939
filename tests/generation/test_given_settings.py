"""What users set of an answer: the same rules as on the command line, and one line for mistakes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import headinfer
from headinfer.errors import OptionError
from saved_models import make_tokenizer, save_llama
from tiny_models import VOCAB, shared_model

PROMPT = "w1 w2 w3 w4 w5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("settings"), eos_token_id=None)


def answer(model: Any, prompt: Any = PROMPT, **given: Any) -> str:
    parts = headinfer.generate(model, prompt, device="cpu", max_new_tokens=12, **given)
    return "".join(part.text for part in parts)


def stock(folder: Path, **given: Any) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    row = model.generate(**inputs, max_new_tokens=12, **given)[0]
    return str(tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize(
    "given",
    [{"temperature": 3.0}, {"top_k": 7}, {"top_p": 0.9}, {"min_p": 0.001}, {"do_sample": True}],
    ids=lambda given: next(iter(given)),
)
def test_settings_of_sampling_turn_it_on_as_flags_do(
    folder: Path, given: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from headinfer.cli import main

    torch.manual_seed(7)
    expected = stock(folder, **given, do_sample=True) if "do_sample" not in given else None
    text = answer(folder, seed=7, **given)
    assert expected in (None, text)
    assert text != stock(folder, do_sample=False)
    flags = [
        each
        for name, value in given.items()
        for each in (f"--{name.replace('_', '-')}", *(() if value is True else (str(value),)))
    ]
    arguments = ("-m", str(folder), "-p", PROMPT, "--raw", "-n", "12", "--device", "cpu")
    with pytest.raises(SystemExit) as ended:
        main.app(["generate", *arguments, *flags, "--seed", "7"], prog_name="headinfer")
    assert ended.value.code == 0
    assert capsys.readouterr().out.rstrip("\n") == text


def test_without_settings_an_answer_is_as_the_model_says(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    given = {"tokenizer": AutoTokenizer.from_pretrained(folder)}
    greedy = stock(folder, do_sample=False)
    assert answer(model, **given) == greedy
    model.generation_config.do_sample = True
    model.generation_config.temperature = 3.0
    assert answer(model, **given, seed=7) == answer(folder, temperature=3.0, seed=7) != greedy
    assert answer(model, **given, do_sample=False) == greedy


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": 0}, "temperature must be above 0; for greedy .* give do_sample=False"),
        ({"temperature": -1.0, "do_sample": True}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number, not nan"),
        ({"top_p": 5}, "top_p must be above 0 and at most 1, not 5"),
        ({"min_p": 2.0}, "min_p must be from 0 to 1, not 2"),
        ({"top_k": 10**30}, "top_k must be at most 2,147,483,647"),
        ({"repetition_penalty": 0}, "repetition_penalty must be above 0"),
        ({"temperature": 0.5, "do_sample": False}, "temperature only matters when sampling"),
        ({"length_penalty": 2.0}, "length_penalty only matters with num_beams of 2 or more"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, "cannot be used with num_beams"),
        ({"num_beams": b"2"}, "num_beams must be a whole number of at least 1, not b'2'"),
        ({"max_time": {}}, "max_time must be a number, not {}"),
        ({"eos_token_id": b"x"}, "eos_token_id must be a token id, or several, not b'x'"),
        ({"max_new_token": 8}, "no option 'max_new_token': did you mean 'max_new_tokens'?"),
        ({"tile_head": 1}, "did you mean 'tile_heads'?"),
        ({"assistent": "x"}, "did you mean 'assistant'?"),
        ({"prompt_lookup": 3}, "it is prompt_lookup_num_tokens here"),
        ({"system": "Be brief."}, "give messages as the prompt, the first with the role 'system'"),
        ({"session": "a.hsession"}, "offload.load_cache reads a session"),
        ({"save_session": "a.hsession"}, "cache.save writes one"),
        ({"seed": 2**64}, r"seed must be a whole number from -2\*\*63 to 2\*\*64 - 1"),
        ({"seed": "7"}, "seed must be a whole number"),
        ({"progress": 3}, "progress must be a function of two counts, not 3"),
        ({"gpus": 10**30}, "gpus must be at most 65,536"),
        ({"disk_cache": "/nowhere"}, "disk_cache '/nowhere' is not there"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_at_once(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words) as raised:
        headinfer.generate("no-model", "w1", **given)
    assert len(str(raised.value).splitlines()) == 1


def kind(given: Any) -> str:
    return type(given).__name__


@pytest.mark.parametrize("prompt", [b"hi", bytearray(b"hi"), memoryview(b"hi")], ids=kind)
def test_bytes_are_no_token_ids(prompt: Any) -> None:
    with pytest.raises(OptionError, match="must be text, messages"):
        answer(shared_model("llama3"), prompt, tokenizer=make_tokenizer(VOCAB))


@pytest.mark.parametrize("device", ["cpu", "simulated"])
@pytest.mark.parametrize("folder", ["/nowhere/at/all", "/dev/null", "a\0b", "x" * 5000], ids=len)
def test_a_disk_cache_that_cannot_be_is_refused_before_the_model_is_touched(
    folder: str, device: str
) -> None:
    model = shared_model("llama3")
    forward = model.forward
    with pytest.raises(OptionError, match="disk_cache '"):  # it names the folder, on a CPU too
        headinfer.attach(model, disk_cache=folder, device=device)
    assert model.forward == forward


@pytest.mark.parametrize("given", ["text", 3, [None], object()], ids=kind)
def test_a_simulated_device_that_is_none(given: Any) -> None:
    with pytest.raises(OptionError, match="simulated_device must be a SimulatedDevice"):
        headinfer.attach(shared_model("llama3"), device="simulated", simulated_device=given)
