"""Transformers' quantised caches as methods of their own, and weights quantised as they load."""

import json
from pathlib import Path

import pytest
from answers_parts import FakeWorkers
from transformers import cache_utils
from typer.testing import CliRunner

from headinfer.bench import quantised
from headinfer.cli import evaluate, evaluate_answers
from headinfer.errors import HeadInferError
from headinfer.evaluate.answers.record import Record
from headinfer.evaluate.answers.worker import answers
from saved_models import WORDS, save_llama

SIZES = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("models") / "tiny", **SIZES))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file: Path = tmp_path_factory.mktemp("texts") / "text.txt"
    file.write_text(". ".join(" ".join(WORDS[at : at + 7]) for at in range(80)) + ".")
    return str(file)


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer in this process, without the seconds of a start."""

    def job(spec):
        for given in answers(spec.to_json()):
            yield Record.from_json(given["record"]) if "record" in given else given["note"]

    monkeypatch.setattr(evaluate_answers, "make_launcher", lambda: FakeWorkers(job))


def document(*arguments: str) -> dict:
    result = CliRunner().invoke(evaluate.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refusal(*arguments: str) -> str:
    """The one line of a run that is refused with exit code 2."""
    result = CliRunner().invoke(evaluate.app, arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, (HeadInferError, SystemExit))
    return " ".join((result.stderr + str(result.exception)).split())


def agreement(model: str, text: str, *arguments: str) -> tuple[str, ...]:
    return ("agreement", "--model", model, "--file", text, "--contexts", "150", *arguments)


def needle(model: str, text: str, *arguments: str) -> tuple[str, ...]:
    asked = ("--contexts", "150", "--depths", "0.5", *arguments)
    return ("needle", "--model", model, "--text", text, *asked)


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this transformers has no fp8 cache"
)
def test_chunks_attend_what_was_rounded(model: str, text: str) -> None:
    asked = agreement(model, text, "--dtype", "float32", "--methods", "quantized-fp8")
    (whole,) = document(*asked)["rows"]
    (chunks,) = document(*asked, "--chunk-tokens", "40")["rows"]
    assert (whole["pass_tokens"], chunks["pass_tokens"]) == (150, 40)
    assert whole["kl_max"] == 0 < chunks["kl_mean"]
    assert (chunks["exact"], chunks["status"]) == (False, "ok")
    assert chunks["note"] == "8 bits by fp8"
    (answered,) = document(*needle(model, text, "--methods", "quantized-fp8"))["rows"]
    assert (answered["status"], len(answered["records"])) == ("ok", 1)


@pytest.mark.parametrize("ask", [agreement, needle])
@pytest.mark.parametrize(
    ("method", "install"),
    [
        ("quantized-hqq-8bit", "pip install hqq"),
        ("quantized-quanto-4bit", "pip install optimum optimum-quanto"),
        ("quantized-fp8", "pip install -U transformers"),
    ],
)
def test_a_backend_that_lacks_is_told_at_once(
    ask, method: str, install: str, model: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantised, "_installed", lambda _module: False)
    monkeypatch.delattr(cache_utils, "Fp8QuantizedLayer", raising=False)
    line = refusal(*ask(model, text, "--methods", f"standard,{method}"))
    assert f"method '{method}' needs the backend" in line
    assert install in line


@pytest.mark.parametrize(("ask", "load_in"), [(agreement, "8bit"), (needle, "4bit")])
def test_weights_are_quantised_as_they_load(ask, load_in: str, model: str, text: str) -> None:
    pytest.importorskip("bitsandbytes", reason="weights are quantised with bitsandbytes")
    settings = ("--dtype", "bfloat16", "--device", "simulated", "--methods", "standard,bounded")
    found = document(*ask(model, text, "--load-in", load_in, "--chunk-tokens", "40", *settings))
    assert f"its own weights in {load_in}" in json.dumps(found["header"])
    assert [row["status"] for row in found["rows"]] == ["ok", "ok"]


@pytest.mark.parametrize("ask", [agreement, needle])
def test_what_cannot_be_quantised_is_told_at_once(
    ask, model: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refusal(*ask(model, text, "--load-in", "8bit", "--dtype", "float32"))
    assert "take --dtype bfloat16" in line
    monkeypatch.setattr("headinfer.generation.quantised.find_spec", lambda _name: None)
    line = refusal(*ask(model, text, "--load-in", "4bit", "--dtype", "bfloat16"))
    assert "weights in 4bit need bitsandbytes: pip install bitsandbytes" in line
