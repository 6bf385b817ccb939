"""Stock models with streaming heads: the mask itself, and that nothing else changes."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache

from headinfer.errors import OptionError, UnsupportedModelError
from headinfer.finding import attention
from headinfer.finding.masked import masked_heads
from headinfer.integration.calls import cache_argument
from headinfer.integration.model_shape import model_shape
from headinfer.plan.shape import LayerKind
from tiny_models import random_tokens, shared_model, tiny_model

MODELS = ["llama3", "qwen2", "gemma2", "gemma3", "gpt-oss", "qwen3-moe"]


def full_layers(model):
    layers = model_shape(model).layers
    return [number for number, layer in enumerate(layers) if layer.kind is LayerKind.FULL]


def heads_in(model, chosen):
    """The same KV heads in each layer that attends all tokens."""
    layers = range(len(model_shape(model).layers))
    return [chosen if layer in full_layers(model) else () for layer in layers]


def logits(model, tokens, **given):
    with torch.no_grad():
        return model(tokens, **given).logits


def registered():
    registries = (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    return [dict(registry) for registry in registries]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("streaming", [(), (0, 1)])
def test_full_heads_and_long_reaches_are_stocks(name, streaming):
    model, tokens = shared_model(name), random_tokens(2, 61)
    with masked_heads(model, heads_in(model, streaming), sink_tokens=0, recent_tokens=61):
        masked = logits(model, tokens)
    torch.testing.assert_close(masked, logits(model, tokens), atol=1e-6, rtol=1e-6)


def by_hand(model, streaming, sinks, recent):
    """Eager attention of a Llama with masks written down token by token."""

    def eager(module, query, key, value, attention_mask, scaling, **_):
        group = query.shape[1] // key.shape[1]
        out = torch.empty_like(query)
        first = key.shape[2] - query.shape[2]
        for head in range(query.shape[1]):
            kv_head = head // group
            for row in range(query.shape[2]):
                i = first + row
                if kv_head in streaming[module.layer_idx]:
                    seen = [j for j in range(i + 1) if j < sinks or i - recent < j]
                else:
                    seen = list(range(i + 1))
                scores = key[0, kv_head, seen] @ query[0, head, row] * scaling
                out[0, head, row] = scores.softmax(0) @ value[0, kv_head, seen]
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("by-hand", eager)
    AttentionMaskInterface.register("by-hand", lambda *_, **__: None)
    model.set_attn_implementation("by-hand")
    try:
        return logits(model, random_tokens(1, 23))
    finally:
        model.set_attn_implementation("eager")
        AttentionInterface._global_mapping.pop("by-hand")
        AttentionMaskInterface._global_mapping.pop("by-hand")


@pytest.mark.covering
@pytest.mark.parametrize(("sinks", "recent"), [(0, 1), (3, 5), (2, 1), (25, 2)])
@pytest.mark.parametrize("block", [1, 40, 2**24])
def test_a_streaming_head_sees_sinks_and_recent_tokens(monkeypatch, sinks, recent, block):
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", block * 8)
    model = tiny_model("llama3")
    streaming = [(0, 3), (), (1,)]
    with masked_heads(model, streaming, sink_tokens=sinks, recent_tokens=recent):
        masked = logits(model, random_tokens(1, 23))
    expected = by_hand(model, streaming, sinks, recent)
    torch.testing.assert_close(masked, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recent", [1, 7])
def test_chunks_and_steps_are_as_one_pass(name, recent):
    model, tokens = shared_model(name), random_tokens(2, 40)
    stock = logits(model, tokens)
    with masked_heads(model, heads_in(model, (1,)), sink_tokens=2, recent_tokens=recent):
        whole = logits(model, tokens)
        cache, parts = DynamicCache(config=model.config), []
        for chunk in tokens.split([17, 1, 15, 1, 6], dim=1):
            parts.append(logits(model, chunk, **cache_argument(model, cache)))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=5e-6, rtol=1e-5)
    assert not torch.allclose(whole, stock, atol=1e-3)


def test_padding_stays_hidden():
    model, tokens = shared_model("llama3"), random_tokens(1, 30)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), tokens), 1)
    mask = (torch.arange(34) >= 4).long()[None]
    positions = (torch.arange(34) - 4).clamp(min=0)[None]
    with masked_heads(model, [(0, 2)] * 3, sink_tokens=0, recent_tokens=6):
        alone = logits(model, tokens)
        beside = logits(model, padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(beside[:, 4:], alone, atol=1e-5, rtol=1e-5)


def test_generating_is_as_reading_the_result():
    model, tokens = shared_model("qwen2"), random_tokens(1, 30)
    with masked_heads(model, [(0,)] * 3, sink_tokens=1, recent_tokens=4):
        out = model.generate(tokens, max_new_tokens=8, do_sample=False)
        again = logits(model, out[:, :-1]).argmax(-1)
    assert torch.equal(again[:, 29:], out[:, 30:])


def test_the_model_is_as_before_also_after_an_error():
    model, tokens = tiny_model("llama3"), random_tokens(1, 20)
    before, config, entries = logits(model, tokens), model.config, registered()

    def fail():
        with masked_heads(model, [(0,)] * 3, sink_tokens=0, recent_tokens=1):
            assert not torch.allclose(logits(model, tokens), before, atol=1e-3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.config is config
    assert registered() == entries
    assert torch.equal(logits(model, tokens), before)


def test_two_models_stream_at_once():
    one, other = tiny_model("llama3", seed=0), tiny_model("llama3", seed=1)
    tokens = random_tokens(1, 20)

    def alone(model, heads):
        with masked_heads(model, heads, sink_tokens=0, recent_tokens=3):
            return logits(model, tokens)

    expected = alone(one, [(0,)] * 3), alone(other, [(1,)] * 3)
    with (
        masked_heads(one, [(0,)] * 3, sink_tokens=0, recent_tokens=3),
        masked_heads(other, [(1,)] * 3, sink_tokens=0, recent_tokens=3),
    ):
        assert torch.equal(logits(one, tokens), expected[0])
        assert torch.equal(logits(other, tokens), expected[1])


@pytest.mark.parametrize(
    ("streaming", "given", "said"),
    [
        ([()] * 2, {}, "given for 2 layers, but the model has 3"),
        ([(), (4,), ()], {}, "layer 1 has 4 KV heads, and no 4"),
        ([()] * 3, {"sink_tokens": -1}, "at least 0 and recent_tokens at least 1, not -1 and 4"),
        ([()] * 3, {"recent_tokens": 0}, "not 4 and 0"),
    ],
)
def test_what_is_out_of_range_is_refused(streaming, given, said):
    given = {"sink_tokens": 4, "recent_tokens": 4} | given
    with (
        pytest.raises(OptionError, match=said),
        masked_heads(shared_model("llama3"), streaming, **given),
    ):
        pass


def test_a_layer_with_a_window_cannot_stream():
    model = shared_model("gemma3")
    with (
        pytest.raises(UnsupportedModelError, match="layer 0 does not attend all"),
        masked_heads(model, [(0,), (), ()], sink_tokens=0, recent_tokens=4),
    ):
        pass


def test_what_would_be_wrong_is_refused():
    model, tokens = tiny_model("llama3"), random_tokens(1, 8)
    with masked_heads(model, [()] * 3, sink_tokens=0, recent_tokens=4):
        cache = StaticCache(config=model.config, max_cache_len=32)
        with pytest.raises(UnsupportedModelError, match="give a dynamic one"):
            logits(model, tokens, **cache_argument(model, cache))
        with pytest.raises(UnsupportedModelError, match="passes position_bias"):
            logits(model, tokens, position_bias=torch.ones(1))
    model = tiny_model("llama3", attention_dropout=0.5).train()
    with (
        masked_heads(model, [()] * 3, sink_tokens=0, recent_tokens=4),
        pytest.raises(UnsupportedModelError, match=r"call eval\(\) first"),
    ):
        logits(model, tokens)
