"""Scores of heads against attention weights that stock eager attention shows."""

import pytest
import torch

from headinfer.errors import UnsupportedModelError
from headinfer.finding import attention, repetition
from headinfer.finding.copying import copying_scores
from headinfer.finding.gates import Gates
from headinfer.finding.masked import masked_heads
from headinfer.finding.repetition import repetition_scores
from headinfer.finding.shape import HeadShape
from headinfer.finding.texts import Copied, Example
from tiny_models import random_tokens, shared_model, tiny_model

MODELS = ["llama3", "gemma2", "gemma3", "gpt-oss", "qwen3-next"]
SINKS, RECENT = 2, 5


class Given:
    """A supply of one text, which is an example, too."""

    def __init__(self, tokens=45) -> None:
        self.name = "given"
        self.again = [3, 4, 5]
        self.ids = random_tokens(1, tokens)[0].tolist()

    def text(self, tokens, seed):
        return self.ids[:tokens]

    def example(self, tokens, seed):
        copied = [
            Copied(at=at, sources=sources)
            for at, sources in ((30, (10, 12)), (31, (27,)), (33, (8,)), (40, (20,)))
        ]
        return Example(ids=tuple(self.ids), copied=tuple(copied))


def heads_of(model):
    return HeadShape.of(model, SINKS, RECENT)


def eager_weights(model, ids):
    """Weights `[kv_heads, group, q_len, kv_len]` of each layer that attends all tokens."""
    heads = heads_of(model)
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_attentions=True).attentions
    attending = [layer for layer, kv_heads in enumerate(heads.kv_heads) if kv_heads]
    weights = dict(zip(attending, found, strict=True))
    return {
        layer: weights[layer][0].unflatten(0, (heads.kv_heads[layer], -1)) for layer in heads.layers
    }


@pytest.mark.covering
@pytest.mark.parametrize("block", [100, 2**24])
@pytest.mark.parametrize("name", MODELS)
def test_repetition_has_the_largest_attention_beyond_reach(monkeypatch, name, block):
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(repetition, "CHUNK_TOKENS", 16)
    model, texts = shared_model(name), Given()
    heads = heads_of(model)
    expected = {layer: torch.zeros(heads.kv_heads[layer]) for layer in heads.layers}
    for start, stop in ((0, 16), (16, 32), (32, 40)):
        read = texts.ids[:40] + texts.again + texts.ids[max(start - 8, 0) : stop]
        for layer, weights in eager_weights(model, read).items():
            for row in range(40, len(read)):
                for token in range(start, stop):
                    if token >= SINKS and row - token >= RECENT:
                        best = weights[:, :, row, token].amax(-1)
                        expected[layer] = expected[layer].maximum(best)
    found = repetition_scores(model, texts, 40, "0", heads)
    assert tuple(map(len, found)) == heads.kv_heads
    for layer, scores in enumerate(found):
        if layer in heads.layers:
            torch.testing.assert_close(torch.tensor(scores), expected[layer], atol=1e-5, rtol=1e-4)
        else:
            assert not any(scores)


@pytest.mark.parametrize("name", MODELS)
def test_copying_counts_where_the_largest_attention_is(name):
    model, texts = shared_model(name), Given()
    heads = heads_of(model)
    copied = [(30, (10, 12)), (33, (8,)), (40, (20,))]  # the one of 31 is within reach
    found = copying_scores(model, texts, 45, "0", heads)
    for layer, weights in eager_weights(model, texts.ids[:40]).items():
        hits, mean = torch.zeros(weights.shape[:2]), torch.zeros(weights.shape[:2])
        for at, sources in copied:
            row = weights[:, :, at - 1]
            hits += sum(row.argmax(-1) == source for source in sources)
            mean += sum(row[..., source] for source in sources)
        expected = ((hits + 1e-3 * mean) / 3).amax(-1)
        torch.testing.assert_close(torch.tensor(found[layer]), expected, atol=1e-6, rtol=1e-4)


def test_copying_counts_a_head_that_copies():
    """A source that is the largest attention of some head makes its score."""
    model, texts = shared_model("llama3"), Given()
    heads = heads_of(model)
    weights = eager_weights(model, texts.ids[:40])[1]
    rows = range(20, 40)
    place = next(
        (row, int(top))
        for row in rows
        if SINKS <= (top := weights[2, 0, row].argmax()) < row + 1 - RECENT
    )
    example = Example(ids=tuple(texts.ids), copied=(Copied(at=place[0] + 1, sources=(place[1],)),))
    texts.example = lambda tokens, seed: example
    assert copying_scores(model, texts, 45, "0", heads)[1][2] >= 1


@pytest.mark.parametrize("name", ["llama3", "gemma2", "gemma3", "gpt-oss"])
def test_gates_go_from_all_tokens_to_few(name):
    model, texts = shared_model(name), Given()
    heads = heads_of(model)
    gates = Gates(model, texts, heads, 1)
    assert gates.step(0, 45, "0") < 1e-9
    count = sum(heads.kv_heads[layer] for layer in heads.layers)
    gates.load({"gates": [0.0] * count})
    streaming = [
        range(kv_heads) if layer in heads.layers else ()
        for layer, kv_heads in enumerate(heads.kv_heads)
    ]
    ids, asking = torch.tensor([texts.ids[:-1]]), [29, 30, 32, 39]

    def hidden():
        return model.base_model(input_ids=ids).last_hidden_state[0, asking]

    with torch.no_grad():
        wanted = hidden()
        with masked_heads(model, streaming, sink_tokens=SINKS, recent_tokens=RECENT):
            expected = (hidden() - wanted).square().mean() / wanted.square().mean()
    assert expected > 1e-4
    assert gates.step(0, 45, "0") == pytest.approx(float(expected), rel=1e-3)


def test_a_gate_falls_unless_its_head_is_missed():
    """A head whose output is thrown away is pulled down, and many others are held."""
    model = tiny_model("llama3")
    with torch.no_grad():  # query heads 6 and 7 are of KV head 3
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 6 * 16 :] = 0
    gates = Gates(model, Given(), heads_of(model), 60)
    for number in range(60):
        gates.step(number, 45, "0")
    rows = gates.rows()
    unused = [row[3] for row in rows]
    assert max(unused) < 0.05
    assert sum(score > 0.3 for row in rows for score in row[:3]) >= 3


def test_a_model_of_windows_alone_is_refused():
    with pytest.raises(UnsupportedModelError, match="no layer of MistralForCausalLM attends all"):
        heads_of(shared_model("mistral-sliding"))
