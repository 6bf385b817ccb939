"""Methods beside stock on tiny models: exact ones agree, wrong and approximate ones are told."""

import math
from itertools import pairwise

import pytest
import torch
from agreement_parts import Told, agreement_spec, rows_of
from transformers.cache_utils import DynamicCache, DynamicLayer

from headinfer.bench import quantised, stock
from headinfer.bench.catalogue import CATALOGUE
from headinfer.bench.methods import METHODS
from headinfer.bench.ours import HeadInfer
from headinfer.bench.result import Status
from headinfer.errors import OptionError
from headinfer.evaluate import reading
from headinfer.evaluate.agreement.run import EXACT_KL, Agreement
from headinfer.evaluate.pace import Pace
from headinfer.plan.options import Options
from tiny_models import random_tokens, shared_model, tiny_model

OURS = ("head-wise-1", "bounded", "resident", "host-attention", "synchronous", "headinfer")


class Rounded(stock.Standard):
    """A cache of 4-bit integers with one scale a head, as no library is needed for."""

    def new_cache(self, max_tokens):
        cache = DynamicCache(config=self._model.config)

        def rounded(part):
            scale = part.abs().amax(dim=-1, keepdim=True) / 7
            return (part / scale).round() * scale

        for layer in cache.layers:
            update = layer.update
            layer.update = lambda keys, values, *rest, update=update, **named: update(
                rounded(keys), rounded(values), *rest, **named
            )
        return cache


class Forgetful(HeadInfer):
    """A cache that has one token's keys negated: an exact method gone wrong a little."""

    def new_cache(self, max_tokens):
        cache = super().new_cache(max_tokens)
        update = cache.layers[0].update

        def damaged(keys, *rest, **named):
            keys = keys.clone()
            keys[:, 0, 0] *= -1
            return update(keys, *rest, **named)

        cache.layers[0].update = damaged
        return cache


@pytest.mark.covering(most=3)
@pytest.mark.parametrize(
    "name", ["llama3", "mistral-sliding", "gemma2", "gemma3", "gpt-oss", "qwen2-moe"]
)
def test_exact_methods_agree_in_float32(name: str) -> None:
    rows = rows_of(shared_model(name), "standard", "chunked-prefill", *OURS)
    assert list(rows) == ["standard", "chunked-prefill", *OURS]
    for row in rows.values():
        assert row.status is Status.OK, row.reason
        assert (row.positions, row.differing, row.agreement) == (150, 0, 1.0)
        assert row.kl_max < EXACT_KL / 100
        assert row.kl_to_float32 is None
    assert rows["standard"].kl_max == 0
    assert rows["headinfer"].kl_mean > 0  # it was another computation


@pytest.mark.parametrize("pass_tokens", [1, 13, 64])
def test_passes_of_any_size_say_the_same(pass_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared_model("mistral-sliding")
    monkeypatch.setattr(reading, "LOGITS_BYTES", 97 * 4 * pass_tokens)
    settings = Options.parse(device="cpu", chunk_tokens="29")
    row = rows_of(model, "headinfer", contexts=(83,), settings=settings)["headinfer"]
    assert (row.positions, row.agreement) == (83, 1.0)
    assert row.kl_max < EXACT_KL / 100
    assert row.pass_tokens == min(29, pass_tokens)
    assert row.stock_pass_tokens == pass_tokens
    assert ("in passes of" in row.note) == (pass_tokens < 29)


def test_contexts_are_beginnings_of_the_text() -> None:
    model, tokens = shared_model("llama3"), random_tokens(1, 200)
    told = Told()
    spec = agreement_spec(model, "standard", "headinfer", contexts=(1, 40, 200))
    rows = list(Agreement(spec, model, tokens, told).rows())
    assert [row.context_tokens for row in rows] == [1, 1, 40, 40, 200, 200]
    assert all(row.positions == row.context_tokens and not row.differing for row in rows)
    assert "headinfer over 40 tokens: 40 of 40 tokens are stock's" in told.lines
    assert "headinfer over 200 tokens: 37 done" in told.lines


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_a_method_that_is_wrong_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "headinfer", Forgetful)
    row = rows_of(shared_model(name), "headinfer")["headinfer"]
    assert row.status is Status.MISMATCH
    assert row.kl_max > EXACT_KL


def test_an_exact_method_that_is_further_from_float32_than_stock_is_found_out_in_16_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama3").bfloat16()
    right = rows_of(model, "bounded")["bounded"]
    assert right.status is Status.OK
    assert right.kl_to_float32 < 1.2 * right.stock_kl_to_float32
    monkeypatch.setitem(METHODS, "headinfer", Forgetful)
    wrong = rows_of(model, "headinfer")["headinfer"]
    assert wrong.status is Status.MISMATCH
    assert wrong.kl_to_float32 > 1.5 * wrong.stock_kl_to_float32


def test_a_method_that_is_wrong_by_little_is_found_out_by_its_divergence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Sharper(stock.Standard):
        def new_cache(self, max_tokens):
            cache = super().new_cache(max_tokens)
            update = cache.layers[0].update
            cache.layers[0].update = lambda keys, *rest, **named: update(keys * 1.1, *rest, **named)
            return cache

    monkeypatch.setitem(METHODS, "chunked-prefill", Sharper)
    tokens = random_tokens(1, 12)
    row = rows_of(shared_model("llama3"), "chunked-prefill", tokens=tokens, contexts=(12,))
    assert row["chunked-prefill"].differing == 0
    assert row["chunked-prefill"].status is Status.MISMATCH


def test_logits_that_are_no_numbers_are_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(stock.Standard):
        def new_cache(self, max_tokens):
            cache = super().new_cache(max_tokens)
            update = cache.layers[0].update
            cache.layers[0].update = lambda keys, *rest, **named: update(
                keys * math.nan, *rest, **named
            )
            return cache

    monkeypatch.setitem(METHODS, "chunked-prefill", Broken)
    for model in (tiny_model("llama3"), tiny_model("llama3").bfloat16()):
        row = rows_of(model, "chunked-prefill")["chunked-prefill"]
        assert row.status is Status.MISMATCH
        assert row.differing == 150


def test_a_cache_of_4_bits_differs_and_is_no_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "kv-4bit", Rounded)
    assert not CATALOGUE["kv-4bit"].exact
    row = rows_of(shared_model("llama3"), "kv-4bit")["kv-4bit"]
    assert row.status is Status.OK
    assert 0 < row.differing < 150
    assert row.agreement == 1 - row.differing / 150
    assert row.kl_mean > 1e-3


def test_16_bits_are_held_against_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "kv-4bit", Rounded)
    model = tiny_model("llama3").bfloat16()
    rows = rows_of(model, "standard", "headinfer", "kv-4bit")
    standard, ours, rounded = rows.values()
    assert standard.kl_max == 0
    assert standard.kl_to_float32 == standard.stock_kl_to_float32 > 0
    assert ours.status is Status.OK
    assert ours.kl_max > 0
    # Summed over the passes of each method, so that last bits may differ.
    assert ours.stock_kl_to_float32 == pytest.approx(standard.stock_kl_to_float32, rel=1e-9)
    # Ours rounds elsewhere than stock, and no more.
    assert ours.kl_to_float32 < 1.5 * standard.kl_to_float32 < rounded.kl_to_float32
    assert ours.ties <= ours.differing < rounded.differing
    assert model.dtype == torch.bfloat16


def test_float32_may_be_left_out() -> None:
    model = tiny_model("llama3").bfloat16()
    row = rows_of(model, "standard", float32=False)["standard"]
    assert row.kl_to_float32 is row.stock_kl_to_float32 is None
    assert row.status is Status.OK


def test_ties_are_no_disagreement_of_exact_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama3")
    head = model.get_output_embeddings().weight
    head[1::2] = head[:-1:2]  # every token has a twin with the same logit

    class Swapped(stock.Standard):
        """Stock with the twins' logits apart by one rounding."""

        def new_cache(self, max_tokens):
            def nudge(_module, _given, output):
                output[..., 1::2] *= 1 + 2 * torch.finfo(output.dtype).eps

            self._hook = self._model.get_output_embeddings().register_forward_hook(nudge)
            return super().new_cache(max_tokens)

        def close(self):
            self._hook.remove()

    monkeypatch.setitem(METHODS, "chunked-prefill", Swapped)
    row = rows_of(model, "chunked-prefill")["chunked-prefill"]
    assert row.differing == row.ties > 0
    assert row.status is Status.OK


def test_what_cannot_run_is_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "_installed", lambda _module: False)
    methods = ("kv-4bit", "transformers-offloaded", "head-wise-8", "standard")
    rows = rows_of(tiny_model("qwen2"), *methods)
    why = {
        "kv-4bit": "pip install optimum optimum-quanto",
        "transformers-offloaded": "needs a GPU",
        "head-wise-8": "has 2 KV heads",
    }
    for method, reason in why.items():
        assert rows[method].status is Status.CANNOT_RUN
        assert reason in rows[method].reason
        assert rows[method].positions is None
    assert rows["standard"].status is Status.OK


def test_the_model_is_left_as_it_was_also_by_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama3")
    before = (dict(vars(model.config)), set(vars(model)))

    def fail(self, *_given, **_named):
        raise MemoryError

    monkeypatch.setattr(DynamicLayer, "update", fail)
    rows = rows_of(model, "standard", "headinfer")
    assert [row.status for row in rows.values()] == [Status.CANNOT_RUN] * 2
    assert "out of memory" in rows["headinfer"].reason
    monkeypatch.undo()
    assert (dict(vars(model.config)), set(vars(model))) == before
    assert rows_of(model, "headinfer")["headinfer"].status is Status.OK


def test_specs_are_checked() -> None:
    model = shared_model("llama3")
    with pytest.raises(OptionError, match="no methods were given"):
        agreement_spec(model)
    with pytest.raises(OptionError, match="named twice"):
        agreement_spec(model, "standard", "standard")
    with pytest.raises(OptionError, match="at least 1 token"):
        agreement_spec(model, "standard", contexts=(0, 5))
    with pytest.raises(OptionError, match="the text has 9 tokens, and contexts go to 150"):
        rows_of(model, "standard", tokens=random_tokens(1, 9))


def test_the_time_left_follows_the_work_that_is_left() -> None:
    seconds = iter([0.0, 1.0, 10.0, 10.0, 11.0, 20.0])
    pace = Pace([1000, 1000, 1000, 2000], lambda: next(seconds))
    assert pace.left_s() is None
    assert pace.left_s(500) > 9.0  # nine times what was done, and attention grows
    pace.finish(1000, ran=True)
    four = pace.left_s()
    assert four > 4 * 10.0
    pace.finish(1000, ran=False)
    assert pace.left_s() == pytest.approx(
        four - 10.0
    )  # what cannot run takes no time, and tells none
    assert pace.left_s(1000) < four - 10.0
    pace.finish(1000, ran=True)
    pace.finish(2000, ran=True)
    assert pace.left_s() == 0


def test_progress_is_told_in_order() -> None:
    model, told = shared_model("llama3"), Told()
    spec = agreement_spec(model, "headinfer", contexts=(100,))
    assert len(list(Agreement(spec, model, random_tokens(1, 100), told).rows())) == 1
    done = [int(line.split()[-2]) for line in told.lines[1:-1]]
    assert told.lines[0] == "begin headinfer over 100 tokens"
    assert done == [37, 74, 100]
    assert all(before < after for before, after in pairwise(done))
