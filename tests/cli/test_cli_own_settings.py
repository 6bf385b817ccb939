"""What a model's own generation config asks for: it holds, or it is said not to."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from headinfer.cli.progress import PrefillBar
from headinfer.cli.sampling import flag
from headinfer.generation.settings import _NOT_HELD, settle
from saved_models import save_llama

NUMBERS = ("-n", 12)


@pytest.fixture
def asking(tmp_path):
    """Make a tiny Llama whose generation config has more settings."""

    def make(**settings):
        model = save_llama(tmp_path)
        file = model / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        return model

    return make


NOT_HELD = {
    "num_return_sequences": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "prefill_chunk_size": {"prefill_chunk_size": 16},
    "guidance_scale": {"guidance_scale": 1.5},
    "token_healing": {"token_healing": True},
    "num_beam_groups": {"num_beam_groups": 2, "num_beams": 1},
    "diversity_penalty": {"diversity_penalty": 0.5},
    "penalty_alpha": {"penalty_alpha": 0.6, "top_k": 4},
    "dola_layers": {"dola_layers": "low"},
    "constraints": {"force_words_ids": [[4]]},
    "is_assistant": {"is_assistant": True},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "output_scores": {"output_scores": True, "output_logits": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
}


@pytest.mark.parametrize("name", NOT_HELD)
def test_what_does_not_hold_is_said_and_changes_nothing(cli, llama, asking, prompt, name):
    plain = cli("generate", "--model", llama, "-p", prompt, *NUMBERS)
    done = cli("generate", "--model", asking(**NOT_HELD[name]), "-p", prompt, *NUMBERS)
    assert done.code == 0, done.err
    assert done.out == plain.out
    (note,) = [line for line in done.err.splitlines() if line.startswith("note: ")]
    told = next(key for key in NOT_HELD[name] if key in _NOT_HELD)
    assert f"{told}=" in note


@pytest.mark.parametrize("implementation", ["dynamic", "hybrid"])
def test_the_usual_caches_are_nothing_to_tell(cli, asking, implementation):
    model = asking(cache_implementation=implementation)
    done = cli("generate", "--model", model, "-p", "w1", *NUMBERS)
    assert done.code == 0, done.err
    assert "note" not in done.err


HELD = {
    "beams": {"num_beams": 3, "early_stopping": True, "length_penalty": 0.5},
    "beams and scores": {"num_beams": 2, "return_dict_in_generate": True, "output_scores": True},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "of the prompt": {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
    "lengths": {"min_new_tokens": 12, "exponential_decay_length_penalty": [2, 1.1]},
    "tokens": {"bad_words_ids": [[50]], "suppress_tokens": [51], "begin_suppress_tokens": [52]},
    "biases": {"sequence_bias": [[[30], 9.0]], "renormalize_logits": True},
    "forced": {"forced_eos_token_id": 2},
    "invalid scores": {"remove_invalid_values": True},
}


@pytest.mark.parametrize("name", HELD)
def test_what_holds_gives_what_stock_transformers_gives(cli, reference, asking, prompt, name):
    done = cli("generate", "--model", asking(**HELD[name]), "-p", prompt, *NUMBERS)
    stock = {key: value for key, value in HELD[name].items() if not key.startswith("return")}
    stock.pop("output_scores", None)
    assert done.code == 0, done.err
    assert done.out == reference(prompt, max_new_tokens=12, **stock) + "\n"


def test_beams_of_the_model_count_as_rows(cli, asking):
    model = asking(num_beams=3)
    done = cli("generate", "--model", model, "-p", "w1 w2", *NUMBERS, "--json")
    assert json.loads(done.out)["plan"]["batch"] == 3


def test_the_user_outranks_the_model(cli, asking, prompt, reference):
    args = ("-p", prompt, *NUMBERS, "--prompt-lookup", 3)
    done = cli("generate", "--model", asking(num_beams=2), *args)
    assert done.out == reference(prompt, max_new_tokens=12) + "\n"
    assert "num_beams=2 (" in done.err


def save_tokenizer_of_characters(folder) -> None:
    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?-+*/()[]{}"
    vocabulary = {character: 4 + index for index, character in enumerate(characters)}
    vocabulary |= {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(folder)


def test_stop_strings_end_the_answer_and_leave_chunks(cli, asking, monkeypatch):
    model = asking()
    save_tokenizer_of_characters(model)
    args = ("generate", "--model", model, "-p", "what opens it", *NUMBERS, "--json")
    args += ("--device", "simulated", "--chunk-tokens", 4)
    whole = json.loads(cli(*args).out)["text"]
    assert len(whole) > 4
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"stop_strings": [whole[1:3]]}))
    chunks = []
    monkeypatch.setattr(PrefillBar, "update", lambda _self, done, _all: chunks.append(done))
    result = json.loads(cli(*args).out)
    assert result["finish_reason"] == "stop"
    assert len(chunks) == 4
    assert result["text"] == whole[:3]


@pytest.mark.parametrize("more", [(), ("--num-beams", "2")], ids=["greedy", "beams"])
def test_stop_strings_need_no_vocabulary_of_a_certain_form(cli, asking, prompt, more):
    args = ("-p", prompt, *NUMBERS, *more, "--json")
    words = json.loads(cli("generate", "--model", asking(), *args).out)["text"].split()
    stop = f"{words[3]} {words[4]}"
    result = json.loads(cli("generate", "--model", asking(stop_strings=[stop]), *args).out)
    assert result["finish_reason"] == "stop"
    assert stop in result["text"]
    assert more or result["text"].split() == words[:5]


def test_a_limit_of_time_is_the_reason_told(cli, tmp_path, prompt):
    model = save_llama(tmp_path, eos_token_id=None)
    file = model / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_time": 1e-9}))
    done = cli("generate", "--model", model, "-p", prompt, *NUMBERS, "--json")
    assert json.loads(done.out)["finish_reason"] == "time"
    assert json.loads(done.out)["new_tokens"] == 1


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"max_new_tokens": 3}, "max_new_tokens=3 (--max-new-tokens is 256 unless given)"),
        ({"max_length": 20}, "max_length=20 (--max-new-tokens is 256 unless given)"),
        ({"max_length": 4096}, None),
    ],
)
def test_limits_of_length_are_the_users(own, words):
    config = GenerationConfig(**own)
    settings = settle({}, config, prompt_tokens=10)
    assert settings.keywords["max_new_tokens"] == settings.max_new_tokens == 256
    assert (settings.note() is None) == (words is None)
    assert words is None or words in settings.note(flag)
    assert settle({"max_new_tokens": 5}, config, prompt_tokens=10).note() is None


def test_every_field_of_a_generation_config_is_looked_at():
    """A field that a new release of transformers adds must be found to hold, or not to."""
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    holds = """
        max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings
        do_sample num_beams temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff
        repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size
        bad_words_ids renormalize_logits remove_invalid_values
        forced_bos_token_id forced_eos_token_id
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
        watermarking_config pad_token_id bos_token_id eos_token_id encoder_no_repeat_ngram_size
        prompt_lookup_num_tokens max_matching_ngram_size transformers_version
    """
    without_effect = """
        cache_config max_cache_len decoder_start_token_id num_assistant_tokens
        num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind
        target_lookbehind assistant_ensemble_weight compile_config disable_compile
        continuous_batching_config
    """
    assert known - {*holds.split(), *without_effect.split(), *_NOT_HELD} == set()
