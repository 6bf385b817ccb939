"""Retrieval under stock attention, and that a damaged cache shows."""

import pytest
import torch
from transformers import DynamicCache

from headinfer.demo import __main__ as command_line
from headinfer.demo import make_document, words
from headinfer.demo.evaluate import encode_prompts, evaluate, num_shared_tokens, prefill


def documents(num_tokens: int, seeds: range):
    return [make_document(num_tokens, seed) for seed in seeds]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("cloze", [False, True])
def test_retrieves_at_4k(model, tokenizer, cloze):
    result = evaluate(model, tokenizer, documents(4096, range(7)), cloze=cloze)
    assert len(result.answers) == 56
    assert 4096 - 64 <= result.prompt_tokens <= 4096
    assert result.accuracy >= 0.99


@pytest.mark.slow
def test_retrieves_at_32k_with_chunked_prefill(model, tokenizer):
    result = evaluate(model, tokenizer, [make_document(32768, 1)], chunk_tokens=8192)
    assert 32768 - 64 <= result.prompt_tokens <= 32768
    assert result.accuracy == 1


@pytest.mark.slow
def test_retrieves_at_32k(model, tokenizer):
    result = evaluate(model, tokenizer, documents(32768, range(13)))
    assert len(result.answers) == 104
    assert result.accuracy >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_retrieves_at_128k(model, tokenizer, seed):
    result = evaluate(model, tokenizer, [make_document(131072, seed)])
    assert 131072 - 64 <= result.prompt_tokens <= 131072
    assert result.accuracy == 1


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_retrieves_in_half_precision(demo_folder, tokenizer, dtype):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        demo_folder, dtype=dtype, attn_implementation="sdpa"
    )
    result = evaluate(model, tokenizer, documents(4096, range(4)))
    assert result.accuracy >= 0.99


def test_generate_answers_a_chat_and_stops(model, tokenizer):
    document = make_document(2048, 3)
    chat = [{"role": "user", "content": document.message(document.facts[0].question)}]
    for fact in document.facts[1:3]:
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt"
        )
        out = model.generate(**prompt, max_new_tokens=30, do_sample=False, prefill_chunk_size=512)
        said = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
        assert said.endswith("." + words.EOS)
        previous = document.facts[document.facts.index(fact) - 1]
        assert said == f" {previous.answer}{words.EOS}"
        chat += [{"role": "assistant", "content": said.removesuffix(words.EOS)}]
        chat += [{"role": "user", "content": fact.question}]


def test_generate_answers_a_padded_batch(model, tokenizer):
    asked = [
        (document, document.facts[-1])
        for document in (make_document(1024, 1), make_document(2048, 2))
    ]
    prompts = [document.message(fact.cloze) for document, fact in asked]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=12, do_sample=False)
    said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said == [f" {fact.answer}" for _, fact in asked]


def test_says_so_when_the_document_does_not_tell(model, tokenizer):
    document = make_document(2048, 0)
    stated = {(fact.adjective, fact.noun) for fact in document.facts}
    stated |= {(adjective, noun) for adjective, noun, _ in document.distractors}
    # Both words occur, but not together.
    adjective, noun = next(
        (a, n) for a, _ in sorted(stated) for _, n in sorted(stated) if (a, n) not in stated
    )
    question = f"Which number opens the strongbox of the {adjective} {noun}?"
    chat = [{"role": "user", "content": document.message(question)}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=30, do_sample=False)
    assert (
        tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        == " unknown."
    )


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("gap", [131072, 2**20 - 8192])
def test_finds_facts_across_any_gap(model, tokenizer, gap):
    """The question's positions start `gap` after the document, as if so much prose lay between."""
    right = 0
    for document in documents(1024, range(4)):
        prompts = encode_prompts(tokenizer, document)
        shared = num_shared_tokens(prompts)
        for fact, prompt in zip(document.facts, prompts, strict=True):
            cache = DynamicCache()
            prefill(model, prompt[:shared], cache)
            ids, said = prompt[shared:], []
            while tokenizer.eos_token_id not in said:
                start = cache.get_seq_length() + gap
                positions = torch.arange(start, start + len(ids))[None]
                with torch.inference_mode():
                    out = model(torch.tensor([ids]), position_ids=positions, past_key_values=cache)
                ids = [int(out.logits[0, -1].argmax())]
                said += ids
            right += tokenizer.decode(said, skip_special_tokens=True) == f" {fact.answer}"
    assert right == 32


def swap_halves(tensor: torch.Tensor) -> None:
    tensor.copy_(tensor.roll(tensor.shape[-2] // 2, dims=-2))


@pytest.mark.covering
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kv_head", [0, 1])
@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("damage", [torch.Tensor.zero_, swap_halves])
def test_damage_to_any_head_shows(model, tokenizer, layer, kv_head, part, damage):
    def spoil(cache):
        damage(getattr(cache.layers[layer], part)[:, kv_head])

    with torch.inference_mode():
        result = evaluate(model, tokenizer, documents(2048, range(3)), after_prefill=spoil)
    # A wrong keeper can be the right one by chance.
    assert result.accuracy <= 0.4


def test_damage_at_one_fact_costs_that_fact_only(model, tokenizer):
    document = make_document(4096, 7)
    ids = encode_prompts(tokenizer, document)[0]
    fact = document.facts[3]
    number = tokenizer.encode(" " + fact.number, add_special_tokens=False)
    at = next(idx for idx in range(len(ids)) if ids[idx : idx + 2] == number)

    def spoil(cache):
        for layer in cache.layers:
            layer.keys[:, :, at : at + 2] = 0
            layer.values[:, :, at : at + 2] = 0

    with torch.inference_mode():
        result = evaluate(model, tokenizer, [document], after_prefill=spoil)
    wrong = [answer for answer in result.answers if not answer.right]
    assert [answer.question for answer in wrong] == [fact.question]
    assert wrong[0].given == "unknown."


def test_a_cache_that_crops_wrongly_shows(model, tokenizer):
    class Forgetful(DynamicCache):
        def crop(self, tokens_to_remove: int) -> None:
            super().crop(tokens_to_remove - 1500)

    result = evaluate(model, tokenizer, documents(4096, range(1)), make_cache=Forgetful)
    assert result.accuracy < 1


def test_no_documents_is_an_error(model, tokenizer):
    with pytest.raises(ValueError, match="at least one"):
        evaluate(model, tokenizer, [])


def test_command_line_prints_a_table(demo_folder, capsys):
    command_line.main(
        ["evaluate", "--model", str(demo_folder), "--tokens", "1024", "--documents", "2"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "right: 16 of 16 = 100.00%"
    assert len(lines) == 5
