"""On the embedded model, the heads that are found to retrieve are those that do."""

import itertools

import pytest
import torch

from headinfer.demo.document import make_document
from headinfer.demo.evaluate import evaluate
from headinfer.demo.tokenizer import build_tokenizer
from headinfer.demo.ungrouped import NEAR, ungroup
from headinfer.demo.weights import construct_model
from headinfer.errors import OptionError
from headinfer.finding.demo_texts import DemoTexts
from headinfer.finding.masked import masked_heads
from headinfer.finding.search import COPY, GATES, REPETITION, SearchSpec, search

REACH = {"sink_tokens": 4, "recent_tokens": 24}
ALL = [(layer, head) for layer in range(2) for head in range(4)]
UNITS = {REPETITION: 1, COPY: 3, GATES: 8}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def grouped(tokenizer):
    return construct_model(tokenizer)


@pytest.fixture(scope="module")
def model(grouped):
    return ungroup(grouped)


def spec_of(method, **changes):
    values = {
        "method": method,
        "model": "demo",
        "dtype": "float32",
        "texts": "documents",
        "tokens": 600,
        "units": UNITS[method],
        "seed": 0,
    }
    return SearchSpec(**values | REACH | changes)


def found(method, model, tokenizer, begun, **changes):
    return search(spec_of(method, **changes), model, DemoTexts(tokenizer), begun)


@pytest.fixture(scope="module", params=[REPETITION, COPY, GATES])
def pattern(request, model, tokenizer, tmp_path_factory):
    begun = tmp_path_factory.mktemp("search") / "work"
    return found(request.param, model, tokenizer, begun)


def streaming(heads):
    return [[head for layer, head in heads if layer == number] for number in range(2)]


def share_right(model, tokenizer, heads):
    documents = [make_document(700, seed) for seed in range(2)]
    with masked_heads(model, streaming(heads), **REACH):
        return evaluate(model, tokenizer, documents).accuracy


def test_ungrouping_changes_nothing(grouped, model):
    ids = torch.arange(5, 200)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, grouped(ids).logits)
    assert model.config.num_key_value_heads == 4
    assert grouped.config.num_key_value_heads == 2


def test_the_heads_that_stream_are_those_that_look_near(pattern):
    assert pattern.kv_heads == (4, 4)
    assert pattern.streaming_heads(len(NEAR) / len(ALL), range(2)) == ((0, 2), ())
    ranked = sorted((pattern.scores[layer][head], (layer, head)) for layer, head in ALL)
    assert ranked[len(NEAR) - 1][0] < 0.9 * ranked[len(NEAR)][0]
    assert (pattern.sink_tokens, pattern.recent_tokens) == (4, 24)


def test_streaming_them_keeps_the_answers(model, tokenizer):
    assert share_right(model, tokenizer, NEAR) >= 0.99


@pytest.mark.covering(most=5)
@pytest.mark.parametrize(
    "others", [pair for pair in itertools.combinations(ALL, 2) if not set(pair) & set(NEAR)]
)
def test_streaming_as_many_others_loses_the_answers(model, tokenizer, others):
    # A fact may lie within reach, and a wrong keeper can be the right one by chance.
    assert share_right(model, tokenizer, others) <= 0.5


def test_each_head_of_the_model_as_it_is_retrieves(grouped, tokenizer, tmp_path):
    pattern = found(REPETITION, grouped, tokenizer, tmp_path / "work")
    assert pattern.kv_heads == (2, 2)
    assert all(score > 0.2 for row in pattern.scores for score in row)


@pytest.mark.parametrize("method", [COPY, GATES])
def test_a_search_goes_on_where_it_was_stopped(model, tokenizer, tmp_path, method):
    whole = found(method, model, tokenizer, tmp_path / "whole", units=3)
    begun, seen = tmp_path / "work", []

    def stop(done, left_s):
        seen.append((done, left_s is None))
        if done == 2:
            raise KeyboardInterrupt

    spec, texts = spec_of(method, units=3), DemoTexts(tokenizer)
    with pytest.raises(KeyboardInterrupt):
        search(spec, model, texts, begun, stop)
    assert seen == [(0, True), (1, False), (2, False)]
    done = []
    resumed = search(spec, model, texts, begun, lambda units, left_s: done.append(units))
    assert done == [2, 3]
    assert resumed == whole
    assert [path.name for path in tmp_path.iterdir()].count("work") == 1


def test_work_of_another_search_is_refused(model, tokenizer, tmp_path):
    begun = tmp_path / "work"
    found(COPY, model, tokenizer, begun, units=1)
    with pytest.raises(OptionError, match="other options: seed 0, not 1; delete it"):
        found(COPY, model, tokenizer, begun, units=1, seed=1)
    for text in ("{", "[]", "{}", '{"spec": {}}'):
        begun.write_text(text)
        with pytest.raises(OptionError, match="holds no work of such a search"):
            found(COPY, model, tokenizer, begun, units=1)


def test_a_reach_that_hides_nothing_is_refused(model, tokenizer, tmp_path):
    with pytest.raises(OptionError, match="hides nothing beyond 4 sinks and 700 recent"):
        found(COPY, model, tokenizer, tmp_path / "work", recent_tokens=700)


def test_training_leaves_the_weights_and_their_flags(grouped, tokenizer, tmp_path):
    model = ungroup(grouped)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found(GATES, model, tokenizer, tmp_path / "work", units=2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
