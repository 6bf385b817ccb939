"""Documents: reproducible, of the wanted size, facts at random depths among distractors."""

import re
from dataclasses import asdict

import pytest

from headinfer.demo import make_document
from headinfer.demo.evaluate import encode_prompts

SIZES = [512, 4096, 32768, 131072]


def test_a_seed_gives_one_document():
    assert make_document(4096, 5) == make_document(4096, 5)
    assert make_document(4096, 5) != make_document(4096, 6)


@pytest.mark.covering
@pytest.mark.parametrize("num_tokens", SIZES)
@pytest.mark.parametrize("cloze", [False, True])
def test_prompt_is_close_to_the_size_and_never_above(tokenizer, num_tokens, cloze):
    prompts = encode_prompts(tokenizer, make_document(num_tokens, 3, num_facts=2), cloze=cloze)
    longest = max(map(len, prompts))
    assert num_tokens - 64 <= longest <= num_tokens


@pytest.mark.parametrize("num_tokens", SIZES)
def test_facts_stand_where_and_as_the_document_says(num_tokens):
    document = make_document(num_tokens, 1)
    assert len(document.facts) == 8
    assert list(document.facts) == sorted(document.facts, key=lambda fact: fact.depth)
    for fact in document.facts:
        sentence = f"{fact.cloze[1:]} {fact.number}."
        assert document.text.count(sentence) == 1
        assert document.text.count(f"{fact.adjective} {fact.noun} opens") == 1
        place = document.text.index(sentence) / len(document.text)
        assert place == pytest.approx(fact.depth, abs=0.05)
        assert f"{fact.adjective} {fact.noun}?" in fact.question
        assert fact.answer == f"{fact.number}, says {' '.join(document.keeper)}."
    assert document.text.count(f"kept by {' '.join(document.keeper)}.") == 1


def test_depths_are_spread_over_the_whole_document():
    depths = [fact.depth for seed in range(40) for fact in make_document(2048, seed).facts]
    tenths = [
        sum(low <= depth < low + 0.1 for depth in depths) for low in (idx / 10 for idx in range(10))
    ]
    assert min(tenths) >= len(depths) / 20


@pytest.mark.parametrize("num_tokens", [4096, 131072])
def test_distractors_have_the_form_of_facts_and_share_their_words(num_tokens):
    document = make_document(num_tokens, 2)
    stated = re.findall(r"strongbox of the (\w+) (\w+) opens with (\d\d-\d\d)\.", document.text)
    facts = [(fact.adjective, fact.noun, fact.number) for fact in document.facts]
    assert sorted(stated) == sorted([*facts, *document.distractors])
    assert len(document.distractors) == pytest.approx(num_tokens / 200, abs=1)
    assert len({name[:2] for name in stated}) == len(stated)
    assert len({name[2] for name in stated}) == len(stated)
    adjectives, nouns = ({fact[idx] for fact in facts} for idx in (0, 1))
    related = [name for name in document.distractors if name[0] in adjectives or name[1] in nouns]
    assert len(related) >= 0.75 * len(document.distractors)


def test_sentences_begin_with_capitals_and_have_no_slots_left():
    text = make_document(32768, 4).text
    assert not re.search(r"[{}]|[.?]\s+[a-z]|  ", text)


@pytest.mark.parametrize(
    ("num_tokens", "num_facts", "message"),
    [(511, 8, "at least 512"), (4096, 0, "from 1 to 16"), (4096, 17, "from 1 to 16")],
)
def test_impossible_documents_are_refused(num_tokens, num_facts, message):
    with pytest.raises(ValueError, match=message):
        make_document(num_tokens, num_facts=num_facts)


def test_a_document_is_plain_data():
    assert asdict(make_document(512))["facts"][0]["number"]
