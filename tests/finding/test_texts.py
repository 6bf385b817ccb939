"""The texts that heads are looked at with: what they hide, and where answers copy it from."""

import pytest

from headinfer.demo.build import build_model
from headinfer.demo.tokenizer import build_tokenizer
from headinfer.errors import OptionError
from headinfer.evaluate.needle.planted import PlantedTexts
from headinfer.evaluate.prompts.haystack import Haystack
from headinfer.finding.demo_texts import DemoTexts, is_demo
from headinfer.finding.texts import Copied, Example
from saved_models import CHAT_TEMPLATE, make_tokenizer

PROSE = " ".join(
    f"It was said in {year} that nothing of note had come to pass." for year in range(400)
)


class Characters:
    """A tokenizer of one token a character, with a chat template or without."""

    def __init__(self, chat_template=None) -> None:
        self.chat_template = chat_template
        self._chat = make_tokenizer()
        self._chat.chat_template = CHAT_TEMPLATE

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, list):
            return {"input_ids": [self(each, add_special_tokens)["input_ids"] for each in text]}
        return {"input_ids": [1] * add_special_tokens + [ord(letter) for letter in text]}

    def apply_chat_template(self, *args, **given):
        return self._chat.apply_chat_template(*args, **given)


def planted(tokens=3000, seed="0", chat=False, raw=False):
    tokenizer = Characters(CHAT_TEMPLATE if chat else None)
    texts = PlantedTexts(Haystack(PROSE, tokenizer), tokenizer, "prose", raw=raw)
    return texts, texts.example(tokens, seed)


def read(ids):
    return "".join(map(chr, ids))


def check_copied(example):
    for token in example.copied:
        for source in token.sources:
            assert source < token.at
            assert example.ids[source] == example.ids[token.at]
    places = [token.at for token in example.copied]
    assert places == sorted(set(places))


@pytest.mark.parametrize("chat", [False, True])
def test_passkeys_are_planted_and_listed(chat):
    _, example = planted(chat=chat)
    assert 2900 < len(example.ids) <= 3000
    check_copied(example)
    text = read(example.ids[not chat :])
    question = text.index("List the passkeys")
    assert ("<assistant>" in text) is chat
    keys = [
        text[part + 4 : part + 10] for part in range(len(text)) if text[part : part + 3] == "is "
    ]
    said = [part.split()[0] for part in text.split(" is ")[1:]]
    assert len(keys) == 20
    assert sorted(said[:10]) == sorted(said[10:])
    assert len(example.copied) == 10 * 7  # the space before six digits, too
    assert all(source < question < token.at for token in example.copied for source in token.sources)
    assert "passkey of" in text[:question]


def test_equal_seeds_give_equal_texts():
    texts, example = planted(seed="a")
    assert texts.example(3000, "a") == example
    assert texts.example(3000, "b") != example
    assert texts.text(500, "a") == texts.text(500, "a") != texts.text(500, "b")
    assert 400 < len(texts.text(500, "a")) <= 500


def test_the_template_can_be_left_out():
    assert planted(chat=True, raw=True)[1] == planted(chat=False)[1]


def test_a_text_too_short_for_a_passkey_is_refused():
    with pytest.raises(
        OptionError, match=r"200 tokens is too short for 1 passkey and its question.*at least"
    ) as told:
        planted(tokens=200)
    least = int(str(told.value).split("at least ")[1].split()[0])
    assert len(planted(tokens=least)[1].copied) == 7


def test_what_is_within_reach_is_not_beyond():
    copied = tuple(Copied(at=at, sources=(source,)) for at, source in ((90, 3), (90, 4), (90, 79)))
    example = Example(ids=tuple(range(100)), copied=(*copied, Copied(at=90, sources=(80,))))
    assert example.beyond(4, 10) == copied[1:]
    assert example.beyond(0, 100) == ()


def test_documents_of_the_embedded_model_are_asked_and_answered():
    tokenizer = build_tokenizer()
    texts = DemoTexts(tokenizer)
    for seed in range(8):
        example = texts.example(600, str(seed))
        check_copied(example)
        answer = tokenizer.decode(example.ids[example.copied[0].at :])
        number, said, forename, surname = answer.split()
        assert said == "says"
        assert number[-1] == ","
        assert len(example.copied) == 4
        document = tokenizer.decode(example.ids[: example.copied[0].at])
        assert f"kept by {forename} {surname}" in document
        before = tokenizer.decode(example.ids[: example.copied[0].sources[0] + 2])
        assert before.endswith(f"opens with {number[:-1]}")
        name = before.split(" opens with ")[-2].split()[-2:]
        assert f"of the {' '.join(name)}?" in document
        assert texts.text(600, str(seed)) == list(example.ids)


def test_a_document_of_few_tokens_is_refused():
    with pytest.raises(OptionError, match="at least 512 tokens, not 511"):
        DemoTexts(build_tokenizer()).example(511, "0")


def test_the_embedded_models_tokenizer_is_known(tmp_path):
    from transformers import AutoTokenizer

    build_model(tmp_path)
    assert is_demo(AutoTokenizer.from_pretrained(tmp_path))
    assert not is_demo(make_tokenizer())
