"""What cannot be served exactly is refused by name, before the model is touched."""

import pytest
import torch
import transformers

import headinfer
from headinfer.errors import (
    CacheStateError,
    MemoryPlanError,
    OptionError,
    UnsupportedModelError,
)
from headinfer.integration.calls import cache_name
from tiny_models import _COMMON, random_tokens, shared_model, tiny_model


def build(model_class: str, config_class: str, **changes: object) -> torch.nn.Module:
    config = getattr(transformers, config_class)(**{**_COMMON, **changes})
    return getattr(transformers, model_class)(config).eval()


MLA = {
    "num_key_value_heads": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
MAMBA = {"num_hidden_layers": 1, "state_size": 4}
LLAMA4 = {"num_local_experts": 2, "intermediate_size_mlp": 32, "attention_chunk_size": 8}

REFUSED = {
    "encoder-decoder": (("T5ForConditionalGeneration", "T5Config", T5), "encoder-decoder"),
    "encoder": (("BertForMaskedLM", "BertConfig", {}), "not a causal language model"),
    "headless": (("LlamaModel", "LlamaConfig", {}), "not a causal language model"),
    "compressed cache": (("DeepseekV3ForCausalLM", "DeepseekV3Config", MLA), "compressed form"),
    "no attention": (("MambaForCausalLM", "MambaConfig", MAMBA), "no attention layer|not served"),
    "own attention": (
        ("MptForCausalLM", "MptConfig", {"d_model": 32, "n_heads": 2, "n_layers": 1}),
        "attention registry",
    ),
    "chunked": (("Llama4ForCausalLM", "Llama4TextConfig", LLAMA4), "chunked attention"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_model_is_refused_and_not_touched(case: str) -> None:
    (model_class, config_class, changes), reason = REFUSED[case]
    model = build(model_class, config_class, **changes)
    config, attention = model.config, model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=reason):
        headinfer.attach(model)
    assert model.config is config
    assert model.config._attn_implementation == attention
    assert not model._forward_pre_hooks


def test_attention_outputs_in_the_config_are_refused() -> None:
    model = tiny_model("llama3")
    model.config.output_attentions = True
    with pytest.raises(UnsupportedModelError, match=r"config of .* has output_attentions"):
        headinfer.attach(model)


def test_hidden_states_in_the_config_come_whole() -> None:
    model = tiny_model("llama3")
    model.config.output_hidden_states = True
    with headinfer.attach(model, chunk_tokens=8):
        output = model(random_tokens(1, 30), logits_to_keep=1)
    assert output.hidden_states[0].shape[1] == 30


def test_something_else_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        headinfer.attach(torch.nn.Linear(2, 2))


class AttentionWithBias(transformers.models.llama.modeling_llama.LlamaAttention):
    """An attention that passes a keyword we do not know."""

    def forward(self, hidden_states, past_key_values=None, **kwargs):  # type: ignore[no-untyped-def]
        attention_interface = kwargs["interface"]
        key_states, value_states = past_key_values.update(hidden_states, hidden_states, 0)
        return attention_interface(
            self, hidden_states, key_states, value_states, None, position_bias=self.bias
        )


def test_an_unknown_keyword_is_refused_before_the_model_runs() -> None:
    model = tiny_model("llama3")
    for layer in model.model.layers:
        layer.self_attn.__class__ = AttentionWithBias
    with pytest.raises(UnsupportedModelError, match="passes position_bias to its attention"):
        headinfer.attach(model)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"cu_seq_lens_q": torch.tensor([0, 10])}, "was given cu_seq_lens_q"),
        ({"attention_mask": torch.ones(1, 1, 10, 10)}, "already 4-D"),
        ({"attention_mask": torch.tensor([[1] * 5])}, "one for each token"),
    ],
)
def test_a_call_with_another_result_is_refused(arguments: dict[str, object], reason: str) -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 10)
    with headinfer.attach(model) as offload:
        with pytest.raises(UnsupportedModelError, match=reason):
            model(tokens, past_key_values=offload.new_cache(), **arguments)
        model(tokens, past_key_values=offload.new_cache())  # and the attachment still works


def test_a_static_cache_is_refused() -> None:
    model = shared_model("llama3")
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    with headinfer.attach(model), pytest.raises(UnsupportedModelError, match="StaticCache"):
        model(random_tokens(1, 10), past_key_values=cache)


def test_a_mask_beyond_causal_is_refused() -> None:
    model = shared_model("llama3")
    from transformers.masking_utils import create_causal_mask

    with headinfer.attach(model), pytest.raises(UnsupportedModelError, match="more than causal"):
        create_causal_mask(
            config=model.config,
            inputs_embeds=torch.zeros(1, 4, 8),
            attention_mask=None,
            past_key_values=None,
            or_mask_function=lambda *_: torch.tensor(True),
        )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"tile_tokens": 0}, "tile_tokens must be a positive integer"),
        ({"tile_heads": -1}, "tile_heads must be a positive integer"),
        ({"tile_heads": 5}, "tile_heads is 5, but LlamaForCausalLM has 4 KV heads"),
        ({"chunk_tokens": "all"}, "chunk_tokens"),
        ({"device_memory": "24 parsecs"}, "'24 parsecs' is not a memory size"),
        ({"host_memory": "-1GiB"}, "is not a memory size"),
        ({"host_memory": ""}, "host_memory: '' is not a memory size"),
        ({"host_memory": 8e9}, "host_memory: a memory size must be text .* write 8000000000"),
        ({"device_memory": 24e9}, "device_memory: a memory size must be text .* 24000000000"),
        ({"device_memory": True}, "device_memory: a memory size must be text .* not True"),
        ({"chunk_tokens": 4096.0}, "chunk_tokens must be a positive integer or 'auto', not 4096.0"),
        ({"chunk_tokens": None}, "chunk_tokens must be a positive integer or 'auto', not None"),
        ({"tile_heads": 2.0}, "tile_heads must be a positive integer, 'all' or 'auto', not 2.0"),
        (
            {"tile_tokens": True},
            "tile_tokens must be a positive integer, .* not True",
        ),
        ({"resident_tokens": None}, "resident_tokens must be an integer from 0 on, .* not None"),
        ({"resident_tokens": False}, "resident_tokens must be an integer from 0 on, .* not False"),
        ({"host_attention": None}, "host_attention must be a share from 0 to 1, .* not None"),
        ({"host_attention": True}, "host_attention must be a share from 0 to 1, .* not True"),
        ({"overlap": "no"}, "overlap must be True or False, not 'no'"),
        ({"progress": 3}, "progress must be a function of two counts, not 3"),
        ({"device": None}, "device must be one of"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, simulated"),
    ],
)
def test_options_are_checked(options: dict[str, object], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        headinfer.attach(shared_model("llama3"), **options)


def test_options_that_do_nothing_on_the_cpu_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = shared_model("llama3")
    with headinfer.attach(model, device="cpu", resident_tokens="4K", host_attention=0.5):
        pass
    named = [record.getMessage().split("=")[0] for record in caplog.records]
    assert named == ["resident_tokens", "host_attention"]
    caplog.clear()
    for device, resident in (("simulated", "4K"), ("cpu", 0), ("cpu", "auto")):
        with headinfer.attach(model, device=device, resident_tokens=resident, host_attention="off"):
            pass
    assert not caplog.records


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(OptionError, match="CUDA is not available"):
        headinfer.attach(shared_model("llama3"), device="cuda")


def test_a_budget_below_the_weights_is_refused() -> None:
    with pytest.raises(MemoryPlanError, match=r"below the weights .* give at least"):
        headinfer.attach(shared_model("llama3"), device_memory="1KiB")


def test_settings_that_do_not_fit_are_refused_with_the_smallest_that_would() -> None:
    with pytest.raises(MemoryPlanError, match="chunk_tokens=128, tile_heads=1, tile_tokens=256"):
        headinfer.attach(
            shared_model("llama3"), device="simulated", device_memory="4MiB", tile_tokens="64K"
        )


def test_too_little_host_memory_is_refused_before_prefill() -> None:
    model = shared_model("llama3")
    calls: list[object] = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with (
            headinfer.attach(model, host_memory="64KiB") as offload,
            pytest.raises(MemoryPlanError, match=r"of 200 tokens needs 300\.00 KiB more"),
        ):
            model(random_tokens(1, 200), past_key_values=offload.new_cache())
    finally:
        handle.remove()
    assert not calls


class Wrapped(torch.nn.Module):
    """A wrapper around a model as PEFT has it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> torch.nn.Module:
        return self.base_model


class Pipeline:
    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (Wrapped, r"Wrapped is not .* attach what its get_base_model\(\) returns"),
        (Pipeline, r"Pipeline is not .* attach its \.model"),
        (torch.nn.DataParallel, r"DataParallel is not .* attach its \.module"),
        (lambda _model: "folder/model", "load 'folder/model' with AutoModelForCausalLM"),
    ],
    ids=["peft", "pipeline", "parallel", "name"],
)
def test_who_attaches_what_holds_a_model_is_told_what_to_attach(wrap, words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        headinfer.attach(wrap(shared_model("llama3")))


def test_a_call_for_another_history_is_told_so() -> None:
    model = shared_model("llama3")
    ids = random_tokens(1, 20)
    with headinfer.attach(model) as offload, torch.no_grad():
        cache = offload.new_cache()
        model(ids, **{cache_name(model): cache})
        short = {"attention_mask": torch.ones(1, 7, dtype=torch.long), cache_name(model): cache}
        with pytest.raises(CacheStateError, match=r"holds 20 tokens .* is for 7 and not for 23"):
            model(ids[:, :3], **short)
        with pytest.raises(CacheStateError, match="holds 20 tokens, and the call brings no new"):
            model.generate(ids[:, :9], max_new_tokens=2, **{cache_name(model): cache})
        assert cache.get_seq_length() == 20


def test_a_call_without_tokens_is_told_so() -> None:
    model = shared_model("llama3")
    none = random_tokens(1, 20)[:, :0]
    with headinfer.attach(model) as offload, torch.no_grad():
        for given in ({}, {cache_name(model): offload.new_cache()}, {"use_cache": False}):
            for call in (model, model.generate):
                with pytest.raises(CacheStateError, match=r"no tokens: .*\(1, 0\).* at least one"):
                    call(input_ids=none, **given)
        embeddings = model.get_input_embeddings()(none)
        with pytest.raises(CacheStateError, match=r"no tokens: inputs_embeds "):
            model(inputs_embeds=embeddings)


def test_tokens_without_rows_are_refused_with_what_to_pass() -> None:
    model = shared_model("llama3")
    with (
        headinfer.attach(model),
        pytest.raises(OptionError, match=r"\(20,\); .*\[batch, tok"),
    ):
        model(random_tokens(1, 20)[0])


def test_token_types_of_text_alone_say_nothing_to_a_model_that_takes_none() -> None:
    model = shared_model("llama3")
    ids = random_tokens(1, 20)
    with torch.no_grad():
        expected = model(ids).logits
        with headinfer.attach(model) as offload:
            cached = {cache_name(model): offload.new_cache()}
            logits = model(ids, token_type_ids=torch.zeros_like(ids), **cached).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
            with pytest.raises(OptionError, match="LlamaForCausalLM takes no token_type_ids"):
                model(ids, token_type_ids=torch.ones_like(ids), **cached)


def test_a_cache_that_the_generation_config_names_makes_room_and_comes_back() -> None:
    model = tiny_model("llama3")
    ids = random_tokens(1, 20)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.generation_config.cache_implementation = "static"
    with headinfer.attach(model) as offload:
        cached = {cache_name(model): offload.new_cache()}
        assert torch.equal(
            model.generate(ids, max_new_tokens=4, do_sample=False, **cached), expected
        )
    assert model.generation_config.cache_implementation == "static"
    with headinfer.attach(model):
        model.generation_config.cache_implementation = "dynamic"
    assert model.generation_config.cache_implementation == "dynamic"


@pytest.mark.parametrize("named_by", ["call", "config"])
@pytest.mark.parametrize("kind", ["static", "offloaded_static", "sliding_window"])
def test_a_static_cache_that_generate_is_to_make_is_refused_by_its_setting(
    kind: str, named_by: str
) -> None:
    model = tiny_model("llama3")
    ids = random_tokens(1, 20)
    with headinfer.attach(model):
        given = {}
        if named_by == "call":
            given = {"cache_implementation": kind}
        else:
            model.generation_config.cache_implementation = kind
        with pytest.raises(UnsupportedModelError) as told:
            model.generate(ids, max_new_tokens=2, **given)
    for words in ("cache_implementation", "generation_config", "offload.new_cache()"):
        assert words in str(told.value)
    assert "\n" not in str(told.value)
