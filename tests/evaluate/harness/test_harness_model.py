"""Our model type beside lm-evaluation-harness's own `hf`, on the same weights in float32."""

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jinja2.exceptions import TemplateError
from transformers.cache_utils import Cache, DynamicCache, QuantizedLayer

pytest.importorskip("lm_eval")

import headinfer
from headinfer.bench.methods import METHODS
from headinfer.bench.model_spec import NamedModel
from headinfer.bench.spec import TrialSpec
from headinfer.errors import OptionError
from headinfer.evaluate import reading
from headinfer.evaluate.answers.answering import Answerer
from headinfer.evaluate.harness import AnsweringLM, HeadInferLM
from headinfer.evaluate.harness.scoring import score_after
from headinfer.evaluate.reading import sharing_weights
from headinfer.integration.calls import cache_argument
from headinfer.integration.model_shape import model_shape
from headinfer.plan.options import Options
from saved_models import CHAT_TEMPLATE, WORDS, make_tokenizer
from tiny_models import tiny_model

ANSWER = {"until": ["w7", "w9 w"], "max_gen_toks": 11, "do_sample": False}


def text(first: int, words: int) -> str:
    return " ".join(WORDS[(first + 7 * place) % 83] for place in range(words))


CONTEXTS = [text(3, 1), text(5, 37), text(11, 64), text(2, 129), ""]
CONTINUATIONS = [" w4", " w5 w6 w7", " w4 w80", " " + text(1, 13)]
PAIRS = [(context, rest) for context in CONTEXTS for rest in CONTINUATIONS]


def requests(arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def model_of(name: str) -> Any:
    # The tokenizer of the tests has 96 words.
    return tiny_model(name, bos_token_id=1, eos_token_id=2, pad_token_id=3)


def hf(model: Any, **keywords: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=sharing_weights(model), tokenizer=make_tokenizer(), **keywords)


@pytest.fixture(params=["llama3", "gemma3"])
def pair(request: pytest.FixtureRequest):
    """Return the harness's type and ours, with one set of weights; gemma3 has sliding windows."""
    model = model_of(request.param)
    ours = HeadInferLM(model, make_tokenizer(), chunk_tokens=16, tile_tokens=32)
    yield hf(model), ours
    ours.close()


def same_scores(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    for (value, is_greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted, abs=2e-3)
        assert is_greedy == wanted_greedy


@pytest.mark.covering
@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_loglikelihoods_are_those_of_hf(pair: Any, batch_size: int) -> None:
    stock, ours = pair
    ours.batch_size = batch_size
    expected = stock.loglikelihood(requests(PAIRS), disable_tqdm=True)
    same_scores(ours.loglikelihood(requests(PAIRS), disable_tqdm=True), expected)


def test_a_greedy_continuation_is_told(pair: Any) -> None:
    stock, ours = pair
    prompt = text(4, 21)
    (answer,) = stock.generate_until(
        requests([(prompt, {"until": [], "max_gen_toks": 3, "do_sample": False})])
    )
    asked = requests([(prompt, " " + answer), (prompt, " " + answer + " w3"), (prompt, " w3 w3")])
    expected = stock.loglikelihood(asked, disable_tqdm=True)
    assert expected[0][1]
    assert not expected[2][1]
    same_scores(ours.loglikelihood(asked, disable_tqdm=True), expected)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_long_prompts_lose_their_beginning_as_with_hf(batch_size: int) -> None:
    model = model_of("llama3")
    stock = hf(model, max_length=24)
    with_ours = HeadInferLM(model, make_tokenizer(), max_length=24, batch_size=batch_size)
    same_scores(
        with_ours.loglikelihood(requests(PAIRS), disable_tqdm=True),
        stock.loglikelihood(requests(PAIRS), disable_tqdm=True),
    )
    asked = requests([(context, ANSWER) for context in CONTEXTS[:-1]])
    assert with_ours.generate_until(asked) == stock.generate_until(asked)


@pytest.mark.covering
@pytest.mark.parametrize("max_length", [2048, 20])
@pytest.mark.parametrize("logits_bytes", [2**29, 97 * 4 * 5])
def test_rolling_loglikelihoods_are_those_of_hf(
    pair: Any, max_length: int, logits_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LOGITS_BYTES", logits_bytes)
    stock, ours = pair
    stock._max_length = ours.max_length = max_length
    asked = requests([(text(7, words),) for words in (1, 19, 20, 21, 61, 130)])
    expected = stock.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_no_call_has_more_logits_than_their_bytes(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LOGITS_BYTES", 97 * 4 * 16)
    model = model_of("llama3")
    ours = HeadInferLM(model, make_tokenizer(), batch_size=batch_size, chunk_tokens=64)
    rows: list[int] = []
    model.register_forward_hook(
        lambda _module, _given, output: rows.append(output.logits[..., 0].numel())
    )
    ours.loglikelihood(requests(PAIRS), disable_tqdm=True)
    ours.loglikelihood_rolling(requests([(text(7, 130),)]), disable_tqdm=True)
    ours.generate_until(requests([(text(7, 130), ANSWER)]), disable_tqdm=True)
    assert max(rows) == 16
    ours.close()


@pytest.mark.covering
@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_hf(pair: Any, batch_size: int) -> None:
    stock, ours = pair
    ours.batch_size = batch_size
    kinds = [ANSWER, ANSWER | {"until": "w1"}, {"max_gen_toks": 5, "until": []}]
    asked = requests([(context, kind) for kind in kinds for context in CONTEXTS[:-1]])
    found = ours.generate_until(asked, disable_tqdm=True)
    assert found == stock.generate_until(asked, disable_tqdm=True)
    assert len(set(found)) > len(CONTEXTS)


def test_text_and_tokens_are_those_of_hf(pair: Any) -> None:
    stock, ours = pair
    for string in ("w4 w5", "<s> w4", text(5, 40)):
        for special in (None, True, False):
            expected = stock.tok_encode(string, add_special_tokens=special)
            assert ours.tok_encode(string, add_special_tokens=special) == expected
    assert ours.tok_decode([7, 8, 2]) == stock.tok_decode([7, 8, 2])
    for found, expected in zip(
        ours.tok_batch_encode(["w4", text(5, 9)], left_truncate_len=6),
        stock.tok_batch_encode(["w4", text(5, 9)], left_truncate_len=6),
        strict=True,
    ):
        assert torch.equal(found, expected)
    assert (ours.eot_token_id, ours.prefix_token_id) == (stock.eot_token_id, stock.prefix_token_id)
    assert ours.max_length == stock.max_length == 2048
    assert ours.tokenizer_name == stock.tokenizer_name


@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_a_text_begins_once(add_bos_token: bool | None) -> None:
    from tokenizers.processors import TemplateProcessing

    model = model_of("llama3")
    ours = HeadInferLM(model, make_tokenizer(), add_bos_token=add_bos_token)
    stock = hf(model, add_bos_token=add_bos_token)
    for each in (ours, stock):
        each.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    for string in ("w4 w5", "<s> w4"):
        for special in (None, True, False):
            expected = stock.tok_encode(string, add_special_tokens=special)
            assert ours.tok_encode(string, add_special_tokens=special) == expected
    assert ours.tok_encode("<s> w4").count(1) == 1
    asked = requests([(context, ANSWER) for context in CONTEXTS[1:-1]])
    assert ours.generate_until(asked) == stock.generate_until(asked)
    same_scores(
        ours.loglikelihood(requests(PAIRS), disable_tqdm=True),
        stock.loglikelihood(requests(PAIRS), disable_tqdm=True),
    )


@pytest.mark.parametrize("prompt", [True, False])
def test_chats_are_those_of_hf(pair: Any, prompt: bool) -> None:
    chat = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}]
    for each in pair:
        each.tokenizer.chat_template = CHAT_TEMPLATE
    found, expected = (each.apply_chat_template(chat, prompt) for each in pair)
    assert found == expected
    assert "w2 w3" in found
    found, expected = (each.chat_template(True) for each in pair)
    assert found == expected == CHAT_TEMPLATE


def test_a_template_without_system_messages_is_given_none() -> None:
    lm = HeadInferLM(model_of("llama3"), make_tokenizer())
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    lm.tokenizer.chat_template = refusal + CHAT_TEMPLATE
    chat = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w2"}]
    assert lm.apply_chat_template(chat) == "<user> w2 <assistant>"


@pytest.mark.parametrize("role", ["system", "user"])
def test_what_a_template_refuses_is_told(role: str, caplog: pytest.LogCaptureFixture) -> None:
    lm = HeadInferLM(model_of("llama3"), make_tokenizer())
    lm.tokenizer.chat_template = (
        f"{{% if messages[0]['role'] == '{role}' %}}{{{{ raise_exception('no {role}') }}}}"
        "{% endif %}" + CHAT_TEMPLATE
    )
    chat = [{"role": "user", "content": "w2"}]
    if role == "user":
        with pytest.raises(TemplateError, match="no user"):
            lm.apply_chat_template(chat)
        assert not caplog.records
        return
    for _ in range(2):
        lm.apply_chat_template([{"role": "system", "content": "w1"}, *chat])
    (record,) = caplog.records
    assert "system message (no system): it is left out" in record.getMessage()


def test_frequencies_that_follow_a_calls_length_are_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    HeadInferLM(model_of("llama3"), make_tokenizer()).close()
    assert not caplog.records
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 16.0}
    for _ in range(2):
        model = tiny_model("llama2", rope_parameters=rope, bos_token_id=1, eos_token_id=2)
        HeadInferLM(model, make_tokenizer()).close()
    (record,) = caplog.records
    assert "rotary frequencies follow the length of a call" in record.getMessage()


class CountingReader:
    """A stock reader that counts the tokens of prefills."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prefilled: list[int] = []

    def new_cache(self, max_tokens: int) -> Any:
        return DynamicCache(config=self.model.config)

    def prefill(self, tokens: Any, cache: Any) -> Any:
        self.prefilled.append(len(tokens))
        ids = torch.tensor([tokens])
        keywords = {"logits_to_keep": 1, **cache_argument(self.model, cache)}
        return self.model(input_ids=ids, **keywords).logits[0, -1]


@pytest.mark.parametrize(("name", "times"), [("llama3", 1), ("gemma3", 2)])
def test_a_context_is_read_once_unless_its_cache_cannot_go_back(name: str, times: int) -> None:
    model, context = model_of(name), list(range(10, 71))
    continuations = [[5], [6, 7, 8], [9], [10, 11]]
    reader = CountingReader(model)
    found = score_after(reader, context, continuations)
    assert reader.prefilled == [len(context)] * times
    for score, rest in zip(found, continuations, strict=True):
        logits = model(torch.tensor([[*context, *rest]])).logits[0, len(context) - 1 : -1]
        wanted = logits.log_softmax(-1)[range(len(rest)), rest].sum()
        assert score.loglikelihood == pytest.approx(float(wanted), abs=1e-3)


class Packed(QuantizedLayer):
    """A quantised layer whose numbers are exact."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return tensor

    def _dequantize(self, packed: torch.Tensor) -> torch.Tensor:
        return packed


class PackedReader(CountingReader):
    """A reader with quantised caches, which notes how many are alive when another is made."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.alive: list[int] = []
        self._made: weakref.WeakSet[Any] = weakref.WeakSet()

    def new_cache(self, max_tokens: int) -> Any:
        self.alive.append(len(self._made))
        count = self.model.config.num_hidden_layers
        cache = Cache(layers=[Packed(residual_length=4) for _ in range(count)])
        self._made.add(cache)
        return cache


def test_a_quantised_cache_is_made_anew_once_the_old_one_is_gone() -> None:
    model, context = model_of("llama3"), list(range(10, 71))
    reader = PackedReader(model)
    continuations = [[6, 7, 8, 9, 10, 11], [10, 11, 3], [4, 5, 6]]
    found = score_after(reader, context, continuations)
    wanted = score_after(CountingReader(model), context, continuations)
    for score, expected in zip(found, wanted, strict=True):
        assert score.loglikelihood == pytest.approx(expected.loglikelihood, abs=1e-3)
    assert reader.prefilled == [len(context)] * 3
    assert reader.alive == [0, 0, 0]


def test_the_choices_of_a_question_read_its_context_once() -> None:
    lm = HeadInferLM(model_of("llama3"), make_tokenizer())
    choices = [(text(5, 200), rest) for rest in CONTINUATIONS]
    lm.loglikelihood(requests(choices), disable_tqdm=True)
    passed = lm.offload.stats.prefill_tokens
    assert passed < 240


def test_the_harness_makes_it_by_name() -> None:
    from lm_eval.api.registry import get_model

    assert get_model("headinfer") is HeadInferLM


def test_simple_evaluate_takes_it_by_name(tmp_path: Any) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from saved_models import save_llama

    folder = save_llama(tmp_path / "model")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "data.json").write_text(
        '{"q": "w1 w2", "c": ["w3", "w4"], "a": 1}\n{"q": "w5", "c": ["w6", "w7"], "a": 0}\n'
    )
    (tasks / "choice.yaml").write_text(
        "task: choice\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks / 'data.json'}}}}}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: a\n'
        "metric_list: [{metric: acc}]\n"
    )
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = [
        lm_eval.simple_evaluate(
            model=name,
            model_args={"pretrained": str(folder), "device": "cpu"} | more,
            tasks=["choice"],
            task_manager=manager,
            bootstrap_iters=0,
        )["results"]["choice"]["acc,none"]
        for name, more in (("headinfer", {"tile_tokens": 32}), ("hf", {"dtype": "float32"}))
    ]
    assert results[0] == results[1]


def test_options_are_checked() -> None:
    model = model_of("llama3")
    with pytest.raises(headinfer.HeadInferError, match="tile_tokens"):
        HeadInferLM(model, make_tokenizer(), tile_tokens="few")
    with pytest.raises(OptionError, match=r"not 'cuda:1'.*CUDA_VISIBLE_DEVICES=1") as raised:
        HeadInferLM(model, make_tokenizer(), device="cuda:1")
    assert "\n" not in str(raised.value)
    with pytest.raises(OptionError, match="batch_size must be a positive integer, not 'auto'"):
        HeadInferLM(model, make_tokenizer(), batch_size="auto")
    lm = HeadInferLM(model, make_tokenizer(), max_length=8)
    with pytest.raises(OptionError, match="leave no room"):
        lm.generate_until(requests([("w1", {"max_gen_toks": 8})]))
    with pytest.raises(OptionError, match="9 tokens is longer than max_length 8"):
        lm.loglikelihood(requests([("w1", " " + text(1, 9))]), disable_tqdm=True)
    lm.close()


def answering(method: str, limit_tokens: int | None = None) -> AnsweringLM:
    model = model_of("llama3")
    spec = TrialSpec(
        method=method,
        context_tokens=256,
        new_tokens=16,
        dtype="float32",
        seed=0,
        model=NamedModel(name="tiny", location="tiny", config=None, planned=model_shape(model)),
        settings=Options(device="cpu"),
    )
    return AnsweringLM(
        Answerer(model, make_tokenizer(), METHODS[method](model, spec), limit_tokens)
    )


@pytest.mark.parametrize("method", ["standard", "headinfer", "bounded"])
def test_a_method_answers_and_scores_as_hf(method: str) -> None:
    ours = answering(method)
    stock = hf(model_of("llama3"))
    asked = requests([(context, ANSWER) for context in CONTEXTS[:-1]])
    assert ours.generate_until(asked) == stock.generate_until(asked)
    same_scores(
        ours.loglikelihood(requests(PAIRS), disable_tqdm=True),
        stock.loglikelihood(requests(PAIRS), disable_tqdm=True),
    )


def test_a_method_with_a_limit_cuts_the_middle() -> None:
    ours, whole = answering("standard", limit_tokens=32), answering("standard")
    prompt = text(2, 129)
    answer = ours.answer(prompt, ANSWER)
    words = prompt.split()
    assert answer.is_cut
    assert answer.read_tokens == 32 - 11
    assert answer.tokens == whole.answer(" ".join(words[:11] + words[-10:]), ANSWER).tokens


def test_a_method_draws_no_tokens() -> None:
    with pytest.raises(OptionError, match="do_sample"):
        answering("standard").answer("w1", ANSWER | {"do_sample": True, "temperature": 0.5})
