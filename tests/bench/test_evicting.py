"""StreamingLLM and H2O against their definitions, step by step, on tiny models."""

from contextlib import closing

import pytest
import torch
from bench_parts import MODEL, trial_spec
from transformers import GPT2Config, GPT2LMHeadModel

from headinfer.bench.catalogue import CATALOGUE, KEPT_PERCENT
from headinfer.bench.evicting import attention
from headinfer.bench.evicting.layers import SINK_TOKENS
from headinfer.bench.evicting.methods import H2O, Evicting, StreamingLLM
from headinfer.bench.fill import fill_randomly
from headinfer.bench.gate import compare
from headinfer.bench.result import TrialResult
from headinfer.bench.spec import Fill, TrialSpec
from headinfer.bench.stock import Standard
from headinfer.bench.trial import run_trial
from headinfer.errors import OptionError, UnsupportedModelError
from headinfer.evaluate.answers.rewinding import place_in, went_back
from headinfer.plan.options import Options
from tiny_models import ARCHITECTURES, random_tokens, shared_model, tiny_model

KINDS = (StreamingLLM, H2O)
SERVED = [name for name in ARCHITECTURES if name != "qwen3-next"]


def spec(pass_tokens: int = 16) -> TrialSpec:
    values = trial_spec("standard").to_json()
    settings = Options.parse(device="cpu", chunk_tokens=str(pass_tokens))
    return TrialSpec.from_json(values | {"settings": settings.keywords()})


@torch.no_grad()
def logits(method, tokens: torch.Tensor, prompt: int, cache=None) -> torch.Tensor:
    """The rows after a prompt and after each further token."""
    cache = cache or method.new_cache(tokens.shape[1])
    rows = [method.prefill(tokens[:, :prompt], cache)]
    rows += [method.step(tokens[:, [place]], cache) for place in range(prompt, tokens.shape[1])]
    return torch.stack(rows)


def one_layer(name: str, **changes):
    return tiny_model(name, num_hidden_layers=1, **changes)


@pytest.mark.covering
@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("kind", KINDS)
def test_while_everything_fits_answers_are_stocks(kind, name):
    model, tokens = shared_model(name), random_tokens(1, 60)
    wanted = logits(Standard(model, spec()), tokens, 50)
    with closing(kind(model, spec(), kept_tokens=60)) as method:
        torch.testing.assert_close(logits(method, tokens, 50), wanted, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(logits(Standard(model, spec()), tokens, 50), wanted)


@pytest.mark.parametrize("name", ["llama2", "llama3", "phi3", "gpt-oss"])
def test_streaming_llm_counts_positions_within_its_cache(name):
    changes = {"layer_types": ["full_attention"]} if name == "gpt-oss" else {}
    model, tokens, kept = one_layer(name, **changes), random_tokens(1, 40), 11
    with closing(StreamingLLM(model, spec(7), kept_tokens=kept)) as method:
        found = logits(method, tokens, 30)
    for row, end in zip(found, range(30, 41), strict=True):
        recent = tokens[:, end - (kept - SINK_TOKENS) : end]
        seen = torch.cat((tokens[:, :SINK_TOKENS], recent), dim=1)  # one text, positions from 0
        torch.testing.assert_close(row, model(seen).logits[0, -1], rtol=2e-5, atol=2e-5)


@pytest.mark.covering
@pytest.mark.parametrize("name", ["llama3", "gemma2", "gemma3", "gpt-oss"])
@pytest.mark.parametrize("pass_tokens", [3, 16, 60])
def test_streaming_llm_does_not_depend_on_the_size_of_passes(name, pass_tokens):
    model, tokens = shared_model(name), random_tokens(1, 70)
    rows = []
    for size in (1, pass_tokens):
        with closing(StreamingLLM(model, spec(size), kept_tokens=20)) as method:
            rows.append(logits(method, tokens, 60))
    torch.testing.assert_close(*rows, rtol=5e-5, atol=5e-5)
    stock = logits(Standard(model, spec()), tokens, 60)
    assert (rows[0] - stock).norm() > 0.01 * stock.norm()


def h2o_by_masks(model, tokens: torch.Tensor, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The published algorithm, a token at a time, by masks under stock's eager attention.

    Returns: logits of every position, and which tokens each KV head keeps at the end.
    """
    config, length = model.config, tokens.shape[1]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    mask = torch.zeros(1, heads, length, length, dtype=torch.bool)
    held = torch.zeros(kv_heads, length, dtype=torch.bool)
    attended = torch.zeros(kv_heads, length)
    for place in range(length):
        held[:, place] = True
        mask[0, :, place] = held.repeat_interleave(heads // kv_heads, 0)
        bias = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        output = model(tokens, attention_mask=bias, output_attentions=True)
        row = output.attentions[0][0, :, place]
        attended += row.unflatten(0, (kv_heads, -1)).sum(1)
        if place >= kept:
            heavy = kept // 2
            for head in range(kv_heads):
                older = held[head].nonzero()[: heavy + 1, 0]
                least = min(older.tolist(), key=lambda each, head=head: attended[head, each])
                held[head, least] = False
    return output.logits[0], held


@pytest.mark.parametrize("name", ["llama2", "llama3"])
@torch.no_grad()
def test_h2o_drops_the_least_attended_token_of_each_kv_head(name):
    model, tokens, kept = one_layer(name), random_tokens(1, 30), 9
    model.model.layers[0].self_attn.q_proj.weight.mul_(30)  # so that heads attend sharply
    wanted, held = h2o_by_masks(model, tokens, kept)
    stock = Standard(model, spec())
    whole = stock.new_cache(30)
    stock.prefill(tokens, whole)
    with closing(H2O(model, spec(1), kept_tokens=kept)) as method:
        cache = method.new_cache(30)
        found = logits(method, tokens, 20, cache)
    torch.testing.assert_close(found, wanted[19:], rtol=2e-5, atol=2e-5)
    (layer,) = cache.layers
    for head, tokens_held in enumerate(held):
        assert tokens_held.sum() == kept
        torch.testing.assert_close(layer.keys[0, head], whole.layers[0].keys[0, head, tokens_held])
    assert len({tuple(each.tolist()) for each in held}) > 1  # heads keep tokens of their own


@torch.no_grad()
def test_h2o_with_passes_drops_tokens_after_each():
    model, tokens = one_layer("llama3"), random_tokens(1, 24)
    given = model(tokens[:, :12], output_attentions=True).attentions[0][0]
    with closing(H2O(model, spec(12), kept_tokens=6)) as method:
        cache = method.new_cache(24)
        method.prefill(tokens[:, :12], cache)
        (layer,) = cache.layers
        sums = given.unflatten(0, (4, -1)).sum(dim=(1, 2))
        heavy = sums[:, :9].topk(3).indices.sort().values
        stock = Standard(model, spec())
        whole = stock.new_cache(12)
        stock.prefill(tokens[:, :12], whole)
        for head in range(4):
            kept = [*heavy[head].tolist(), 9, 10, 11]
            torch.testing.assert_close(
                layer.keys[0, head], whole.layers[0].keys[0, head, kept], rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pass_tokens", [1, 5, 64])
@torch.no_grad()
def test_no_more_is_kept_than_was_asked_for(kind, pass_tokens):
    model, tokens = shared_model("gemma3"), random_tokens(1, 50)
    with closing(kind(model, spec(pass_tokens), kept_tokens=17)) as method:
        cache = method.new_cache(50)
        for part in tokens.split(10, dim=1):
            method.prefill(part, cache)
            windows, full = [cache.layers[0], cache.layers[2]], cache.layers[1]
            assert full.keys.shape[2] == min(17, full.get_seq_length())
            assert full.values.shape == full.keys.shape
            assert all(type(layer).__name__ == "DynamicSlidingWindowLayer" for layer in windows)
        assert cache.get_seq_length() == 50
        held = method.held(cache)
        assert held.host_bytes == sum(layer.keys.nbytes * 2 for layer in cache.layers)
        assert method.sizes(cache) == {"chunk_tokens": pass_tokens, "kept_tokens": 17}


@pytest.mark.parametrize(("name", "percent"), KEPT_PERCENT.items())
def test_methods_keep_the_share_that_their_names_say(name, percent):
    result = run_trial(trial_spec(name))
    assert result.kv_host_bytes == MODEL.kv_bytes(303 * percent // 100, "float32")
    assert f"keeps {percent}% of the tokens" in result.note
    assert not CATALOGUE[name].exact


@pytest.mark.parametrize("name", KEPT_PERCENT)
def test_dropped_tokens_are_told_by_the_comparison_with_stock(name):
    reference, result = (run_trial(trial_spec(each)) for each in ("standard", name))
    verdict = compare(reference, result, dtype="float32", layers=MODEL.layers, context_tokens=300)
    assert not verdict.passed
    assert 0.01 < verdict.logits_error < 2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_filled_at_random_keeps_as_much(kind):
    model = shared_model("llama3")
    with closing(kind(model, spec(), kept_tokens=12)) as method:
        cache = method.new_cache(40)
        fill_randomly(model, cache, 30, seed=1)
        one = torch.zeros(1, 4, 1, 16)
        keys, values = cache.update(one, one, 0)
        assert keys.shape[2] in (12, 13)  # the new one among them, or beside them
        assert values.shape == keys.shape
        cache.layers[0].seen_tokens -= 1
        method.step(random_tokens(1, 1), cache)
        assert [layer.keys.shape[2] for layer in cache.layers] == [12] * 3
        assert cache.get_seq_length() == 31


@pytest.mark.parametrize("name", KEPT_PERCENT)
def test_decode_steps_can_be_timed_after_a_random_fill(name):
    values = trial_spec(name).to_json() | {"fill": Fill.RANDOM.value}
    result = run_trial(TrialSpec.from_json(values))
    assert isinstance(result, TrialResult)
    assert len(result.decode_s) == 3


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_conversation_can_go_back(kind):
    model, tokens = shared_model("llama3"), random_tokens(1, 40)
    with closing(kind(model, spec(8), kept_tokens=16)) as method:
        cache = method.new_cache(40)
        method.prefill(tokens[:, :30], cache)
        place = place_in(cache, 30, 10)
        first = method.prefill(tokens[:, 30:], cache)
        cache = went_back(cache, place, again=True)
        assert cache.get_seq_length() == 30
        torch.testing.assert_close(method.prefill(tokens[:, 30:], cache), first)


def test_queries_are_attended_a_few_at_a_time(monkeypatch):
    model, tokens = shared_model("llama3"), random_tokens(1, 40)
    rows = []
    for size in (attention._SCORES_BYTES, 3 * 4 * 8 * 40):
        monkeypatch.setattr(attention, "_SCORES_BYTES", size)
        asked = []
        with closing(H2O(model, spec(40), kept_tokens=20)) as method:
            told = attention.Call.attend

            def counted(call, seen, asked=asked, told=told, **given):
                tell = given["tell"]

                def both(each):
                    asked.append(each.shape[2])
                    tell(each)

                return told(call, seen, **given | {"tell": both})

            monkeypatch.setattr(attention.Call, "attend", counted)
            rows.append(logits(method, tokens, 40))
            monkeypatch.setattr(attention.Call, "attend", told)
        assert max(asked) == (40 if size > 2**20 else 3)
    torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_16_bits_are_served(kind, dtype):
    model, tokens = tiny_model("llama3").to(dtype), random_tokens(1, 40)
    wanted = logits(Standard(model, spec()), tokens, 30).float()
    with closing(kind(model, spec(), kept_tokens=40)) as method:
        found = logits(method, tokens, 30).float()
    assert (found - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_models_are_left_as_they_were_also_when_refused(kind):
    model = tiny_model("llama3")
    config = model.config
    with pytest.raises(OptionError, match=r"at least \d tokens are kept, not 1"):
        kind(model, spec(), kept_tokens=1)
    with pytest.raises(OptionError, match=r"above 0 and at most 1, not 1\.5"):
        kind(model, spec(), kept_share=1.5)
    method = kind(model, spec())
    assert model.config._attn_implementation.startswith("headinfer_evicting")
    method.close()
    assert model.config is config
    assert config._attn_implementation == "eager"


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("qwen3-next", {}, "Qwen3NextForCausalLM keeps a recurrent state"),
        ("llama3", {"rope_parameters": DYNAMIC}, "LlamaForCausalLM has rotary frequencies that"),
    ],
)
def test_models_that_cannot_pass_in_parts_are_refused_by_name(kind, name, changes, told):
    with pytest.raises(UnsupportedModelError, match=told):
        kind(tiny_model(name, **changes), spec())


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)).eval()


def test_learned_positions_cannot_be_moved_within_a_cache():
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel does not turn queries"):
        StreamingLLM(gpt2(), spec())


def test_a_rotary_embedding_whose_turns_are_no_turns_is_refused(monkeypatch):
    model = tiny_model("llama3")
    rotary = type(model.model.rotary_emb)
    stock = rotary.forward

    def by_squares(self, x, position_ids):
        return stock(self, x, position_ids**2)

    monkeypatch.setattr(rotary, "forward", by_squares)
    with pytest.raises(UnsupportedModelError, match="does not give those of an earlier position"):
        StreamingLLM(model, spec())


def test_a_scaled_rotary_embedding_is_turned_back_without_its_scale():
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 512,
    }
    model, tokens = one_layer("llama3", rope_parameters=yarn), random_tokens(1, 30)
    assert model.model.rotary_emb.attention_scaling != 1
    with closing(StreamingLLM(model, spec(7), kept_tokens=12)) as method:
        found = logits(method, tokens, 30)[0]
    seen = torch.cat((tokens[:, :SINK_TOKENS], tokens[:, 22:]), dim=1)
    torch.testing.assert_close(found, model(seen).logits[0, -1], rtol=2e-5, atol=2e-5)


def test_h2o_serves_learned_positions():
    model, tokens = gpt2(), random_tokens(1, 30)
    wanted = logits(Standard(model, spec()), tokens, 20)
    with closing(H2O(model, spec(), kept_tokens=30)) as method:
        torch.testing.assert_close(logits(method, tokens, 20), wanted, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_several_texts_and_padding_are_refused():
    model = shared_model("llama3")
    with closing(H2O(model, spec())) as method:
        assert isinstance(method, Evicting)
        with pytest.raises(UnsupportedModelError, match="take one text, without padding"):
            method.prefill(random_tokens(2, 5), method.new_cache(5))
        mask = torch.tensor([[0, 1, 1]])
        with pytest.raises(UnsupportedModelError, match="take one text, without padding"):
            model(random_tokens(1, 3), attention_mask=mask)
