"""Answers with drafts: the very tokens of those without, in fewer passes."""

import logging
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria

import headinfer
from headinfer.errors import OptionError
from headinfer.generation import drafts
from headinfer.generation.acceptance import Choice, accepted_tokens
from headinfer.generation.draws import copied
from headinfer.generation.stream import Generated
from headinfer.integration.said import SaidOnce
from saved_models import make_tokenizer, save_llama
from tiny_models import ARCHITECTURES, VOCAB, random_tokens, tiny_model

TOKENIZER = make_tokenizer(VOCAB)
SMALL = {"device": "simulated", "chunk_tokens": 16, "tile_heads": 1, "tile_tokens": 8}
WINDOWED = {"mistral-sliding"}  # in all layers, so that there is nothing to choose from
RECURRENT = {"qwen3-next"}
CHI_SQUARE_7 = 18.48  # exceeded by chance once in 100 times, with 7 degrees of freedom
DRAFTABLE = {"draft_tokens": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "sampled": {"do_sample": True, "temperature": 0.8},
    "warped": {"do_sample": True, "top_k": 12, "top_p": 0.9, "repetition_penalty": 1.1},
}


def prompt(seed: int = 1) -> list[int]:
    """Token ids that repeat themselves, so that lookups find something."""
    return random_tokens(1, 9, seed=seed).repeat(1, 10)[0].tolist()


def answer(
    model: PreTrainedModel, ids: list[int], seed: int = 0, **keywords: Any
) -> tuple[str, Generated]:
    torch.manual_seed(seed)
    keywords = {"max_new_tokens": 24} | keywords
    records = list(headinfer.generate(model, ids, tokenizer=TOKENIZER, **keywords))
    return "".join(record.text for record in records), records[-1]


def like(model: PreTrainedModel, name: str, noise: float = 0.05) -> PreTrainedModel:
    """A model that mostly says what another one says."""
    assistant = tiny_model(name)
    assistant.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(7)
    for parameter in assistant.parameters():
        parameter.data += (
            noise * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
        )
    return assistant


def drafters(name: str, model: PreTrainedModel, drafts: int = 4) -> dict[str, dict[str, Any]]:
    return {
        "lookup": {"prompt_lookup_num_tokens": drafts + 1, "draft": drafts + 1},
        "assistant": {"assistant": like(model, name), "draft": drafts},
        "itself": {"draft": drafts},
    }


def check_same(
    name: str, seeds: range, device: dict[str, Any], drafts: int = 4, **settings: Any
) -> int:
    """Compare answers with those without drafts; return how many drafts were accepted."""
    model = tiny_model(name)
    accepted = 0
    with headinfer.attach(model, **device, **DRAFTABLE):
        for seed in seeds:
            ids = prompt(seed + 1)
            text, plain = answer(model, ids, seed, draft="off", **settings)
            for own in drafters(name, model, drafts).values():
                drafted, last = answer(model, ids, seed, **settings, **own)
                assert drafted == text
                found_none = name in WINDOWED or "prompt_lookup_num_tokens" in own
                assert last.drafted_tokens > 0 or found_none
                assert (last.tokens, last.finish_reason) == (plain.tokens, plain.finish_reason)
                accepted += last.accepted_tokens
    return accepted


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_answer_is_the_one_without_drafts(settings: str) -> None:
    assert check_same("llama3", range(1), {"device": "cpu"}, **SETTINGS[settings]) > 4


@pytest.mark.covering("name", most=1)
@pytest.mark.parametrize(("name", "chunk_tokens"), [("gemma3", 8), ("llama3", 16)])
def test_as_many_drafts_as_auto_takes_at_the_most(name: str, chunk_tokens: int) -> None:
    """The pass that verifies them is a whole chunk, or two."""
    device = SMALL | {"chunk_tokens": chunk_tokens}
    assert check_same(name, range(1), device, 15, max_new_tokens=40) > 4


@pytest.mark.parametrize("name", ["gemma3"])
def test_windows_take_drafts_back(name: str) -> None:
    assert check_same(name, range(1), SMALL, **SETTINGS["warped"], max_new_tokens=20) > 4


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", sorted({*ARCHITECTURES} - RECURRENT))
def test_answers_of_all_architectures(name: str, settings: str) -> None:
    for device in ({"device": "cpu"}, SMALL):
        for seeds, number in ((range(2), 4), (range(2, 4), 15)):
            check_same(name, seeds, device, number, **SETTINGS[settings], max_new_tokens=60)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
def test_answers_of_many_seeds(settings: str) -> None:
    check_same("llama3", range(0, 200, 2), {"device": "cpu"}, **SETTINGS[settings])
    check_same("llama3", range(1, 200, 2), {"device": "cpu"}, 15, **SETTINGS[settings])


class StopAt(StoppingCriteria):
    """A criterion that counts what it is asked."""

    def __init__(self, tokens: int) -> None:
        self.texts: list[list[int]] = []
        self._tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.texts.append(input_ids[0].tolist())
        return torch.tensor([len(self.texts) >= self._tokens])


class Counting(LogitsProcessor):
    """A processor that counts what it is asked, as those of users may do."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.texts.append(input_ids[0].tolist())
        penalties = torch.bincount(input_ids[0], minlength=scores.shape[-1]) * len(self.texts)
        return scores - 0.1 * penalties


@pytest.mark.parametrize("stop_at", [1, 5, 11])
def test_processors_and_criteria_see_the_answers_tokens_alone(stop_at: int) -> None:
    model, ids = tiny_model("llama3"), prompt()
    seen = []
    with headinfer.attach(model, device="cpu", **DRAFTABLE):
        for own in ({"draft": "off"}, *drafters("llama3", model).values()):
            processor, criterion = Counting(), StopAt(stop_at)
            text, last = answer(
                *(model, ids),
                logits_processor=[processor],
                stopping_criteria=[criterion],
                **own,
            )
            seen.append((text, last.tokens, processor.texts, criterion.texts))
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]
    assert seen[3] == seen[0]


@pytest.mark.parametrize("drafter", ["lookup", "itself"])
def test_every_end_is_where_it_is_without_drafts(drafter: str) -> None:
    model, ids = tiny_model("llama3"), prompt()
    with headinfer.attach(model, device="cpu", **DRAFTABLE) as offload:
        own = drafters("llama3", model)[drafter]
        whole, _ = answer(model, ids, draft="off")
        words = whole.split()
        for number in (1, 4, 6):
            ends: list[dict[str, Any]] = [
                {"stop": words[number]},
                {"stop_strings": [f"{words[number - 1]} {words[number]}"]},
                {"eos_token_id": TOKENIZER.convert_tokens_to_ids(words[number])},
                {"max_new_tokens": number},
            ]
            for end in ends:
                text, plain = answer(model, ids, draft="off", **end)
                drafted, last = answer(model, ids, **end, **own)
                assert (drafted, last.tokens) == (text, plain.tokens), end
                assert last.finish_reason == plain.finish_reason
        assert offload.stats.accepted_tokens > 0


def test_a_cache_holds_what_it_does_without_drafts() -> None:
    """All but the newest token, so that a conversation goes on."""
    from headinfer.generation.call import Generation
    from headinfer.generation.drafts import Drafts
    from headinfer.generation.settings import settle

    model, ids = tiny_model("llama3"), prompt()
    with headinfer.attach(model, device="cpu") as offload:
        held = []
        for asked in (Drafts(), Drafts(number=4, assistant=like(model, "llama3"))):
            pieces: list[str] = []
            settings = settle({"max_new_tokens": 15}, model.generation_config, len(ids))
            cache = offload.new_cache()
            generation = Generation(
                *(model, TOKENIZER, offload.session, settings, pieces.append),
                cache=cache,
                logprobs=2,
                drafts=asked,
            )
            generation.run(ids)
            assert cache.token_ids is not None
            assert cache.token_ids[0].tolist() == [*ids, *generation.ids[:-1]]
            assert cache.stats.decode_tokens == 14
            assert generation.scores is not None
            held.append((generation.ids, generation.scores.drain(), cache))
        (plain, scores, _), (drafted, drafted_scores, cache) = held
        assert drafted == plain
        assert cache.stats.accepted_tokens > 0
        assert cache.stats.decode_steps < 14
        assert [each.token_id for each in drafted_scores] == drafted
        for own, other in zip(drafted_scores, scores, strict=True):
            assert own.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in own.top] == [token for token, _ in other.top]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("device", [{"device": "cpu"}, SMALL])
def test_a_model_drafts_itself_where_it_is_asked_to(device: dict[str, Any]) -> None:
    model, ids = tiny_model("llama3"), random_tokens(1, 140)[0].tolist()
    settings = device | {"draft_tokens": 64, "chunk_tokens": 128, "tile_tokens": 32}
    plainly = settings | {"draft_tokens": 0}
    expected, plain = answer(model, ids, **plainly, draft="off", max_new_tokens=24)
    assert plain.verifications == 0
    text, last = answer(model, ids, **settings, draft=3, max_new_tokens=24)
    assert text == expected
    assert last.verifications >= 23 // 4
    assert 3 * (last.verifications - 3) < last.drafted_tokens <= 3 * last.verifications
    assert 0 < last.draft_s + last.verify_s <= last.decode_s * (1 + 1e-9)
    text, auto = answer(model, ids, **settings, max_new_tokens=24)
    assert text == expected
    assert 2 <= auto.verifications < 23


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the log says of drafts, as if nothing had been said before."""
    monkeypatch.setattr(drafts, "_said", SaidOnce(logging.getLogger("headinfer.drafts")))
    with caplog.at_level(logging.WARNING):
        yield caplog


def test_a_number_alone_has_the_model_draft(said: pytest.LogCaptureFixture) -> None:
    model, ids = tiny_model("llama3"), random_tokens(1, 1100)[0].tolist()
    expected, plain = answer(model, ids)
    assert plain.verifications == 0
    text, last = answer(model, ids, draft=3)  # an eighth of the context, and 256 tokens at least
    assert text == expected
    assert last.verifications > 0
    with headinfer.attach(model, device="cpu"):
        for _ in range(2):
            text, last = answer(model, ids, draft=3)
            assert (text, last.verifications) == (expected, 0)
    assert said.text.count("nothing is drafted: no tokens are set aside for it (draft_tokens)") == 1


def test_drafts_are_counted() -> None:
    model, ids = tiny_model("llama3"), prompt()
    assistant = like(model, "llama3", noise=0)
    _, last = answer(model, ids, assistant=assistant, draft=4, max_new_tokens=21)
    assert (last.drafted_tokens, last.accepted_tokens, last.verifications) == (16, 16, 4)
    assert 0 < last.draft_s + last.verify_s <= last.decode_s * (1 + 1e-9)
    _, off = answer(model, ids, draft="off")
    assert (off.drafted_tokens, off.verifications, off.draft_s) == (0, 0, 0)
    _, few = answer(model, ids, draft=8, prompt_lookup_num_tokens=2)
    assert 0 < few.drafted_tokens <= 2 * few.verifications, "a lookup's own limit holds"
    _, auto = answer(model, ids, assistant=assistant, max_new_tokens=60)
    assert auto.verifications < 60 - 3, "some steps without drafts are timed"


def test_an_attached_assistant_drafts_with_its_own_cache() -> None:
    model, ids = tiny_model("llama3"), prompt()
    assistant = like(model, "llama3")
    expected, _ = answer(model, ids)
    with headinfer.attach(assistant, **SMALL) as offload:
        text, last = answer(model, ids, assistant=assistant, draft=3)
        assert offload.stats.decode_tokens > 0
    assert text == expected
    assert last.accepted_tokens > 0


def test_models_that_cannot_take_tokens_back_are_not_drafted_for(
    said: pytest.LogCaptureFixture,
) -> None:
    model, ids = tiny_model("qwen3-next"), prompt()
    expected, _ = answer(model, ids)
    text, last = answer(model, ids, prompt_lookup_num_tokens=4)
    assert (text, last.drafted_tokens) == (expected, 0)
    assert "nothing is drafted: the model has recurrent states" in said.text
    with pytest.raises(OptionError, match="the assistant has recurrent states"):
        answer(tiny_model("llama3"), prompt(), assistant=model)


def test_models_that_rotate_by_the_length_of_a_pass_are_not_drafted_for(
    said: pytest.LogCaptureFixture,
) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    settings = {"rope_parameters": rope, "max_position_embeddings": 64}
    ids = prompt()  # each model remembers the longest text
    expected, _ = answer(tiny_model("llama3", **settings), ids)
    text, last = answer(tiny_model("llama3", **settings), ids, prompt_lookup_num_tokens=4)
    assert (text, last.drafted_tokens) == (expected, 0)
    assert "nothing is drafted: the model's rotary frequencies follow" in said.text


def test_what_cannot_be_drafted_is_refused(tmp_path: Any) -> None:
    model, ids = tiny_model("llama3"), prompt()
    for draft in (0, 32, True, "many", 1.5):
        with pytest.raises(OptionError, match="draft must be from 1 to 31, 'off' or 'auto'"):
            headinfer.generate(model, ids, tokenizer=TOKENIZER, draft=draft)
    with pytest.raises(OptionError, match="assistant must be a folder, an id or a loaded model"):
        headinfer.generate(model, ids, tokenizer=TOKENIZER, assistant=3)
    with pytest.raises(OptionError, match="both draft; leave one of them out"):
        answer(model, ids, assistant=model, prompt_lookup_num_tokens=3)
    for given in ({"assistant": model}, {"prompt_lookup_num_tokens": 3}, {"draft_tokens": 64}):
        with pytest.raises(
            OptionError, match=f"draft off has nothing drafted, which {next(iter(given))}"
        ):
            headinfer.generate(model, ids, tokenizer=TOKENIZER, draft="off", **given)
    with pytest.raises(OptionError, match="draft_tokens 0 leaves its drafts nothing to attend"):
        headinfer.generate(model, ids, tokenizer=TOKENIZER, draft=4, draft_tokens=0)
    with pytest.raises(OptionError, match="draft_tokens 64 takes memory for drafts of the model"):
        headinfer.generate(
            model, ids, tokenizer=TOKENIZER, prompt_lookup_num_tokens=3, draft_tokens=64
        )
    other = tiny_model("llama3", vocab_size=VOCAB + 2000)
    with pytest.raises(OptionError, match="knows 2,097 tokens and the model 97"):
        answer(model, ids, assistant=other)


def test_an_assistant_comes_before_a_lookup_that_the_model_has_of_its_own() -> None:
    model, ids = tiny_model("llama3"), prompt()
    assistant = like(model, "llama3", noise=0)
    _, last = answer(model, ids, assistant=assistant, draft=4, max_new_tokens=21)
    model.generation_config.prompt_lookup_num_tokens = 2
    _, own = answer(model, ids, assistant=assistant, draft=4, max_new_tokens=21)
    assert own.drafted_tokens == last.drafted_tokens == 16


def test_an_assistant_is_loaded_by_its_name(tmp_path: Any) -> None:
    folder = save_llama(tmp_path / "assistant")
    model, ids = tiny_model("llama3"), prompt()
    expected, _ = answer(model, ids)
    text, last = answer(model, ids, assistant=folder, draft=2)  # of 96 tokens, and not of 97
    assert text == expected
    assert last.drafted_tokens > 0


def test_drafts_leave_the_distribution_as_it_is() -> None:
    """Tokens by one distribution, each drafted by another one with the same numbers."""
    own = torch.tensor([[0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.04, 0.01]])
    other = torch.tensor([[0.15, 0.2, 0.3, 0.12, 0.05, 0.1, 0.04, 0.04]])
    ids = torch.zeros(1, 1, dtype=torch.long)
    generator = torch.Generator().manual_seed(3)
    choice = Choice(processors=LogitsProcessorList(), samples=True, generator=generator)
    tries = 4000
    counts, drafted, accepted = torch.zeros(8), torch.zeros(8), 0
    for _ in range(tries):
        ahead = choice.ahead(copied(generator))
        draft = int(ahead.token(ids, other.log()))
        token = int(choice.token(ids, own.log()))
        drafted[draft] += 1
        counts[token] += 1
        accepted += draft == token
    assert chi_square(counts, own[0]) < CHI_SQUARE_7
    assert chi_square(drafted, other[0]) < CHI_SQUARE_7
    assert chi_square(counts, other[0]) > 10 * CHI_SQUARE_7
    distance = float((own - other).abs().sum() / 2)
    assert accepted / tries > (1 - distance) / (1 + distance), "two that draw alike agree so often"


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    wanted = expected * counts.sum()
    return float(((counts - wanted) ** 2 / wanted).sum())


def test_drafts_are_right_until_one_is_wrong() -> None:
    assert accepted_tokens([1, 2, 3], [1, 2, 4]) == 2
    assert accepted_tokens([1, 2, 3], [1, 2, 3, 9]) == 3
    assert accepted_tokens([1, 2, 3], [1]) == 1
    assert accepted_tokens([1], [2]) == accepted_tokens([], [2]) == 0
