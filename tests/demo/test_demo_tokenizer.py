"""The tokenizer: whole words, exact round trips, natural chat prompts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.demo import make_document, words
from headinfer.demo.tokenizer import build_tokenizer, count_tokens

TOKENIZER = build_tokenizer()


def no_special(text: str) -> bool:
    return not any(token in text for token in words.SPECIAL_TOKENS)


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])).filter(no_special))
def test_any_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n",
        "a  b\t\r\n",
        "1874, 5-6-789",
        "-91",
        "\x00",
        "漢字 é e\u0301",
        "👩‍👩‍👧",
        "[UNK] don't .",
    ],
)
def test_awkward_text_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=True) == text


def test_saved_tokenizer_is_the_same(tokenizer):
    text = make_document(2048).text
    assert tokenizer(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert (tokenizer.bos_token, tokenizer.eos_token) == (words.BOS, words.EOS)


def test_text_begins_with_one_begin_token_also_in_chat(tokenizer):
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True
    )
    for ids in (tokenizer("hello")["input_ids"], chat["input_ids"]):
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("seed", range(3))
def test_documents_are_whole_words_and_counted_right(tokenizer, seed):
    document = make_document(4096, seed)
    ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
    assert count_tokens(document.text) == document.num_tokens == len(ids)
    # Spelled in bytes, a word would be as many tokens as letters.
    longest = len(document.text.replace("\n\n", " ").split(" ")) * 1.3
    assert len(ids) < longest


def test_names_are_one_token_in_each_form(tokenizer):
    for word in (*words.ADJECTIVES, *words.NOUNS, *words.FORENAMES, *words.SURNAMES):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1
        assert len(tokenizer.encode(" " + word, add_special_tokens=False)) == 1


def test_names_have_no_other_meaning_in_prose():
    from headinfer.demo import prose

    texts = [
        *prose.SENTENCES,
        *prose.FACTS,
        prose.KEEPER,
        prose.QUESTION,
        *sum(prose.SLOTS.values(), ()),
    ]
    used = {word.strip(".,;?").lower() for text in texts for word in text.split()}
    names = [*words.ADJECTIVES, *words.NOUNS, *words.FORENAMES, *words.SURNAMES]
    assert not used & {name.lower() for name in names}
    assert len(set(names)) == len(names)


def test_chat_template_text(tokenizer):
    chat = [
        {"role": "user", "content": "Which?\n"},
        {"role": "assistant", "content": " This. "},
        {"role": "user", "content": "And which?"},
    ]
    said = "<|begin|><|user|>Which?<|assistant|> This.<|end|><|user|>And which?"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == said
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert asked == said + "<|assistant|>"


def test_every_token_has_an_embedding(tokenizer):
    ids = sorted(tokenizer.get_vocab().values())
    assert ids == list(range(len(tokenizer)))
    assert max(tokenizer(" (a) - (A) b").input_ids) < len(tokenizer)
