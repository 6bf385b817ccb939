"""Samples of RULER beside lm-evaluation-harness's own."""

import contextlib
import io
import random
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from ruler_files import SENTENCES, save_files

from headinfer.errors import OptionError
from headinfer.evaluate.ruler.kinds import KINDS, OFFLINE
from headinfer.evaluate.ruler.needles import FORMS, draw_word, hide
from headinfer.evaluate.ruler.samples import Maker, tracked
from saved_models import make_tokenizer

WORDS = " ".join(SENTENCES).split(" ")


def sentences(text: str) -> list[str]:
    return re.findall(r"[^.]+\.|[^.]+$", text)


@pytest.fixture(scope="module")
def harness():
    """Return the harness's module of needles.

    As it is imported it wants to download data, and lists all pairs of words, which takes long.
    """
    import nltk
    import wonderwords

    few = {"nouns": ["cat", "dog", "sea"], "adjectives": ["big", "old"], "verbs": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *_: True)
        with pytest.MonkeyPatch.context() as beside:
            beside.setattr(wonderwords, "RandomWord", lambda: SimpleNamespace(_categories=few))
            from lm_eval.tasks.ruler import prepare_niah
        patch.setattr(prepare_niah, "cached_sent_tokenize", sentences)
        yield prepare_niah


@pytest.mark.parametrize("units", [4, 5, 61, 300])
@pytest.mark.parametrize("kind", FORMS)
def test_needles_lie_where_the_harness_puts_them(harness: Any, kind: str, units: int) -> None:
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    form = FORMS[kind]
    haystack = WORDS if form.haystack == "essay" else harness.get_haystack(form.haystack)
    random.seed(11)
    text, answers, query = harness.generate_input_output(
        units,
        haystack,
        type_haystack=form.haystack,
        num_needle_k=max(form.keys, form.queries),
        type_needle_k=form.key,
        num_needle_v=form.values,
        type_needle_v=form.value,
        num_needle_q=form.queries,
        template=TEMPLATE,
    )
    found = hide(
        form,
        units,
        random.Random(11),
        essay=lambda count: sentences(" ".join(WORDS[:count])),
        word=lambda drawn: drawn.choice(harness.WORDS),
    )
    assert (found.text, found.answers) == (text, answers)
    assert all(answer in text for answer in answers)
    assert query in found.prefix


@pytest.mark.parametrize("kind", ["niah_multikey_3", "niah_multiquery"])
def test_answers_begin_as_the_harness_has_it(harness: Any, kind: str) -> None:
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE

    form = FORMS[kind]
    (doc,) = harness.generate_samples(
        WORDS if form.haystack == "essay" else harness.get_haystack(form.haystack),
        TOKENIZER=make_tokenizer(),
        max_seq_length=700,
        template=TEMPLATE,
        type_haystack=form.haystack,
        type_needle_k=form.key,
        type_needle_v=form.value,
        num_needle_q=form.queries,
        num_samples=1,
    )
    found = hide(form, 9, random.Random(0), essay=lambda count: SENTENCES[:count])

    def shape(text: str) -> str:
        return re.sub(r" for .* mentioned", " for ... mentioned", text)

    assert shape(found.prefix) == shape(doc["gen_prefix"])


def test_words_are_an_adjective_and_a_noun() -> None:
    from wonderwords import RandomWord

    kinds = RandomWord()._categories
    adjectives, nouns = (set(kinds[name]) for name in ("adjectives", "nouns"))
    drawn = random.Random(3)
    words = [draw_word(drawn) for _ in range(200)]
    for word in words:
        ends = [place for place, letter in enumerate(word) if letter == "-"]
        assert any(word[:end] in adjectives and word[end + 1 :] in nouns for end in ends)
    assert len(set(words)) > 190


def test_chains_are_put_together_as_in_the_harness() -> None:
    from lm_eval.tasks.ruler import vt_utils

    tokenizer, most, noises = make_tokenizer(), 1500, 40
    (example,) = vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, 500, incremental=5)
    random.seed(5)
    np.random.seed(5)
    (doc,) = vt_utils.sys_vartrack_w_noise_random(
        tokenizer, 1, most, incremental=noises, icl_example=example
    )
    random.seed(5)
    np.random.seed(5)
    vt_utils.generate_input_output(noises, 1, 4)  # its search for the length
    vt_utils.generate_input_output(2 * noises, 1, 4)
    text, answers = vt_utils.generate_input_output(noises, 1, 4)
    shown = f"{example['input']} {' '.join(example['outputs'])}\n\n"
    found = tracked(shown, text, answers)
    assert (found.input, found.outputs) == (doc["input"], doc["outputs"])
    assert found.gen_prefix == doc["gen_prefix"]


def harness_doc(kind: str, most: int, harness: Any) -> dict[str, Any]:
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, niah_utils, vt_utils

    tokenizer = make_tokenizer()
    with contextlib.redirect_stdout(io.StringIO()):
        if kind == "ruler_vt":
            (example,) = vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, 500, incremental=5)
            return vt_utils.sys_vartrack_w_noise_random(tokenizer, 1, most, icl_example=example)[0]
        if kind == "ruler_cwe":
            return cwe_utils.sys_word_pair_random(1, most, tokenizer)[0]
        if kind == "ruler_fwe":
            return fwe_utils.sys_kwext(tokenizer, most, 1)[0]
        form = FORMS[kind]
        return harness.generate_samples(
            harness.get_haystack(form.haystack),
            TOKENIZER=tokenizer,
            max_seq_length=most,
            template=niah_utils.TEMPLATE,
            type_haystack=form.haystack,
            type_needle_k=form.key,
            type_needle_v=form.value,
            num_samples=1,
        )[0]


def lines(text: str) -> set[str]:
    """Return the forms of a text's lines, without what is drawn."""
    text = re.sub(r"1\. \S+.*", "<list>", text)
    text = re.sub(r"for .* (is:|mentioned)", r"for <key> \1", text)
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "<number>", text)
    text = re.sub(r"(VAR [A-Z]+ = (VAR [A-Z]+|\d+) *)", "", text)
    text = re.sub(r"\b[A-Z]{3,5}\b( *[A-Z]{3,5}\b)*", "<name>", text)
    text = re.sub(r"\d+", "<number>", text)
    text = re.sub(r"three most frequently appeared coded words\. .*", "<coded>", text)
    return {" ".join(line.split()) for line in text.splitlines()}


@pytest.mark.covering
@pytest.mark.parametrize("most", [1200, 5000])
@pytest.mark.parametrize("kind", OFFLINE)
def test_samples_have_the_form_and_the_length_of_the_harness(
    kind: str, most: int, harness: Any
) -> None:
    tokenizer = make_tokenizer()
    doc = harness_doc(kind, most, harness)
    found = Maker(kind, most, tokenizer).sample(0)
    if kind != "ruler_vt":  # its chains break sentences of noise where they lie
        assert lines(found.input) == lines(doc["input"])
    assert lines(found.gen_prefix) == lines(doc["gen_prefix"])
    assert len(found.outputs) == len(doc["outputs"])
    words = len(found.input.split())
    assert words == pytest.approx(len(doc["input"].split()), abs=520, rel=0.12)
    assert words <= most


@pytest.mark.parametrize("kind", KINDS)
def test_any_sample_can_be_drawn_alone(kind: str, tmp_path: Any) -> None:
    folder = str(save_files(tmp_path))
    state = random.getstate()
    first, second = (Maker(kind, 2500, make_tokenizer(), seed=4, folder=folder) for _ in range(2))
    second.sample(3)
    second.sample(1)
    assert first.sample(3) == second.sample(3)
    assert first.sample(2) != first.sample(3)
    other = Maker(kind, 2500, make_tokenizer(), seed=5, folder=folder)
    if kind != "ruler_qa_squad":  # it has all documents in any case
        assert other.sample(3) != first.sample(3)
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("kind", "most"),
    [*((kind, 3000) for kind in OFFLINE), ("niah_single_1", 140_000), ("ruler_cwe", 80_000)],
)
def test_samples_of_any_length_fill_it(kind: str, most: int) -> None:
    maker = Maker(kind, most, make_tokenizer())
    sample = maker.sample(0)
    tokens = maker.tokens(sample.input)
    assert 0.8 * most <= tokens <= most
    for answer in sample.outputs:
        assert answer in sample.input


@pytest.mark.parametrize("kind", OFFLINE)
def test_a_length_without_room_is_refused(kind: str) -> None:
    with pytest.raises(OptionError, match=rf"{kind} does not fit into 150 tokens.*give larger"):
        Maker(kind, 150, make_tokenizer()).sample(0)


def test_documents_that_are_too_long_are_refused(tmp_path: Any) -> None:
    maker = Maker("ruler_qa_squad", 84, make_tokenizer(), folder=str(save_files(tmp_path)))
    with pytest.raises(OptionError, match="ruler_qa_squad does not fit into 84 tokens; give"):
        maker.sample(0)


def test_questions_are_read_as_the_harness_reads_them(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks.ruler import qa_utils

    from headinfer.evaluate.ruler.files import questions, read_json
    from headinfer.evaluate.ruler.kinds import HOTPOT, SQUAD

    folder = str(save_files(tmp_path))
    for source, reader in ((SQUAD, qa_utils.read_squad), (HOTPOT, qa_utils.read_hotpotqa)):
        monkeypatch.setattr(qa_utils, "download_json", lambda _, of=source: read_json(folder, of))
        expected = reader(url=folder)
        assert [
            {name: value for name, value in each.items() if value != []}
            for each in questions(folder, source)[0]
        ] == [{name: value for name, value in each.items() if value != []} for each in expected[0]]
        assert questions(folder, source)[1] == expected[1]


@pytest.mark.parametrize("kind", ["ruler_qa_squad", "ruler_qa_hotpot"])
def test_a_question_keeps_its_documents(kind: str, tmp_path: Any) -> None:
    folder = str(save_files(tmp_path))
    sample = Maker(kind, 400, make_tokenizer(), folder=folder).sample(1)
    assert any(answer in sample.input for answer in sample.outputs)
    assert sample.gen_prefix == "Answer:"
    assert len(sample.input.split()) <= 400


def test_essays_begin_again_beyond_their_end(tmp_path: Any) -> None:
    folder = str(save_files(tmp_path))
    maker = Maker("niah_single_2", 5 * len(WORDS), make_tokenizer(), folder=folder)
    text = maker.sample(0).input
    assert text.count(SENTENCES[0]) >= 4


def test_files_of_another_form_are_refused(tmp_path: Any) -> None:
    for name in ("PaulGrahamEssays.json", "dev-v2.0.json"):
        (tmp_path / name).write_text('["no"]')
    for kind, name in (("niah_single_2", "PaulGraham"), ("ruler_qa_squad", "dev-v2.0")):
        with pytest.raises(OptionError, match=rf"{name}.*is of another form; fetch it again"):
            Maker(kind, 900, make_tokenizer(), folder=str(tmp_path))
    (tmp_path / "dev-v2.0.json").write_text("no")
    from headinfer.evaluate.ruler.files import questions

    questions.cache_clear()
    with pytest.raises(OptionError, match="cannot be read: it is not JSON"):
        Maker("ruler_qa_squad", 900, make_tokenizer(), folder=str(tmp_path))
