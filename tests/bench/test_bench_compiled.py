"""Stock's static cache with compiled decode steps: exact, compiled before it is timed, refused."""

import weakref
from dataclasses import replace

import pytest
import torch
from bench_parts import MODEL, trial_spec

from headinfer.bench.catalogue import COMPILED, DRAFTS, FIXED, parse_methods
from headinfer.bench.gate import compare
from headinfer.bench.methods import METHODS
from headinfer.bench.model_spec import NamedModel
from headinfer.bench.result import Status, TrialFailure
from headinfer.bench.spec import Fill, TrialSpec
from headinfer.bench.trial import attempt, run_trial
from headinfer.cli.shapes import shape_of
from tiny_models import random_tokens, tiny_model


@pytest.fixture
def uncompiled():
    with torch.compiler.set_stance("force_eager"):
        yield


def named_spec(folder, name: str) -> TrialSpec:
    model = tiny_model(name)
    model.save_pretrained(folder)
    shape = shape_of(str(folder), dtype="float32")
    named = NamedModel(name="tiny", location=None, config=model.config.to_dict(), planned=shape)
    return replace(trial_spec(COMPILED, context_tokens=60), model=named)


def check_agrees(spec: TrialSpec) -> None:
    reference, result = (run_trial(replace(spec, method=name)) for name in ("standard", COMPILED))
    verdict = compare(
        reference,
        result,
        dtype=spec.dtype,
        layers=spec.model.layers,
        context_tokens=spec.context_tokens,
    )
    assert verdict.passed, verdict.reason
    assert verdict.tokens == (4 if spec.fill is Fill.PREFILL else 3)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("fill", [Fill.PREFILL, Fill.RANDOM])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_static_cache_agrees_with_the_reference(uncompiled, dtype, fill):
    check_agrees(replace(trial_spec(COMPILED, dtype), fill=fill))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("fill", [Fill.PREFILL, Fill.RANDOM])
@pytest.mark.parametrize("name", ["mistral-sliding", "gemma3"])
def test_so_it_does_past_the_end_of_a_window(uncompiled, tmp_path, name, fill):
    check_agrees(replace(named_spec(tmp_path, name), fill=fill))


@pytest.mark.parametrize("context_tokens", [1, 3])
def test_a_prompt_may_be_shorter_than_what_is_rehearsed(uncompiled, context_tokens):
    check_agrees(trial_spec(COMPILED, context_tokens=context_tokens))


def test_all_that_the_static_cache_takes_is_told(uncompiled):
    result = run_trial(trial_spec(COMPILED))
    assert result.kv_host_bytes == MODEL.kv_bytes(303, "float32")
    assert result.kv_device_bytes == result.streamed_kv_bytes == 0


def test_a_new_cache_is_empty(uncompiled):
    spec = trial_spec(COMPILED)
    cache = METHODS[COMPILED](tiny_model("llama3"), spec).new_cache(20)
    assert cache.get_seq_length() == 0
    for layer in cache.layers:
        assert layer.keys.shape[2] == spec.all_tokens
        assert not layer.keys.any()
        assert not layer.values.any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "mistral-sliding"])
def test_steps_are_compiled_before_the_trial_and_never_again(tmp_path, name):
    model, spec = tiny_model(name), named_spec(tmp_path, name)
    tokens = random_tokens(1, spec.all_tokens)
    compiled, standard = (METHODS[method](model, spec) for method in (COMPILED, "standard"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch.no_grad():
        keys = weakref.ref(compiled.new_cache(spec.all_tokens).layers[0].keys)
        assert keys() is None  # or two caches would have to fit
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
        with torch.compiler.set_stance("fail_on_recompile"):
            logits = logits_of(compiled, tokens, spec)
        torch.testing.assert_close(logits, logits_of(standard, tokens, spec))


def logits_of(method, tokens: torch.Tensor, spec: TrialSpec) -> torch.Tensor:
    cache = method.new_cache(spec.all_tokens)
    rows = [method.prefill(tokens[:, : spec.context_tokens], cache)]
    for token in tokens[:, spec.context_tokens :].split(1, dim=1):
        rows.append(method.step(token, cache))
    return torch.stack(rows)


def test_all_methods_are_those_that_are_served():
    assert COMPILED in parse_methods("all")
    assert parse_methods("all", evaluated=True) == tuple(
        name for name in parse_methods("all") if name not in (COMPILED, DRAFTS, FIXED)
    )


@pytest.mark.slow
def test_without_a_compiler_the_row_says_so_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Set back by torch: monkeypatch would leave no such setting behind.
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        outcome = attempt(trial_spec(COMPILED))
    assert isinstance(outcome, TrialFailure)
    assert outcome.status is Status.CANNOT_RUN
    assert outcome.reason.startswith("torch.compile failed: ")
    assert "no-such-compiler" in outcome.reason
    assert "\n" not in outcome.reason
