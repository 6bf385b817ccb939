"""`headinfer.generate`: what it yields, however it ends, and what it leaves behind."""

import contextlib
import itertools
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import headinfer
from headinfer.demo import build_model, make_document
from headinfer.demo.evaluate import encode_prompts
from headinfer.errors import HeadInferError, NotANumberError, OptionError, UnsupportedModelError
from headinfer.generation.stream import Generated
from headinfer.integration.attachment import owner_of
from saved_models import WORDS, make_tokenizer, save_llama
from tiny_models import ARCHITECTURES, VOCAB, random_tokens, tiny_model

SMALL_TILES = {"device": "simulated", "chunk_tokens": 16, "tile_heads": 1, "tile_tokens": 8}
DEVICES = [{"device": "cpu"}, SMALL_TILES]
PROMPT = " ".join(WORDS[number * 7 % 90] for number in range(70))


def llama(**config: Any) -> tuple[PreTrainedModel, Any]:
    """A tiny Llama in hand that never comes to an end, and its tokenizer."""
    return tiny_model("llama3", **config), make_tokenizer(VOCAB)


def stock(model: PreTrainedModel, ids: list[int], **settings: Any) -> list[int]:
    """What transformers generates greedily by itself."""
    prompt = torch.tensor([ids])
    settings = {"do_sample": False, "max_new_tokens": 12} | settings
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)[
        0, len(ids) :
    ].tolist()


def whole(records: list[Generated]) -> str:
    """The answer, once its records were found to be in order."""
    assert [record.finish_reason is None for record in records[:-1]] == [True] * (len(records) - 1)
    assert records[-1].finish_reason in ("stop", "length", "time")
    assert all(record.text for record in records[:-1])
    counts = [record.tokens for record in records]
    assert counts == sorted(counts)
    return "".join(record.text for record in records)


@pytest.mark.covering
@pytest.mark.parametrize("options", DEVICES, ids=["cpu", "simulated"])
@pytest.mark.parametrize("name", ["llama3", "mistral-sliding", "gemma2", "qwen3-next", "gpt-oss"])
def test_an_answer_is_what_stock_transformers_gives(name: str, options: dict[str, Any]) -> None:
    assert name in ARCHITECTURES
    model, tokenizer = tiny_model(name), make_tokenizer(VOCAB)
    ids = random_tokens(1, 40)[0].tolist()
    expected = stock(model, ids)
    records = list(
        headinfer.generate(model, ids, tokenizer=tokenizer, max_new_tokens=12, **options)
    )
    assert whole(records) == tokenizer.decode(expected, skip_special_tokens=True)
    assert (records[-1].tokens, records[-1].finish_reason) == (12, "length")
    assert owner_of(model) is None
    assert stock(model, ids) == expected


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "model"
    build_model(folder)
    return folder


def test_the_embedded_model_answers_its_questions(demo: Path) -> None:
    document = make_document(2048, 3)
    prompts = encode_prompts(AutoTokenizer.from_pretrained(demo), document)
    for ids, fact in itertools.islice(zip(prompts, document.facts, strict=True), 2):
        records = list(headinfer.generate(demo, ids, chunk_tokens=512, max_new_tokens=16))
        assert whole(records).strip() == fact.answer
        assert records[-1].finish_reason == "stop"
        assert records[-1].prompt_tokens == len(ids)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("chat"), chat=True)


def test_text_messages_and_token_ids_are_prompts(chat: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(chat),
        AutoTokenizer.from_pretrained(chat),
    )
    message = {"role": "user", "content": PROMPT}
    templated = tokenizer(
        tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True),
        add_special_tokens=False,
    )["input_ids"]
    plain = tokenizer(PROMPT)["input_ids"]
    assert len(templated) > len(plain)
    for prompt, ids in (
        (PROMPT, plain),
        ([message], templated),
        (plain, plain),
        (torch.tensor([plain]), plain),
    ):
        answer = whole(list(headinfer.generate(str(chat), prompt, max_new_tokens=12)))
        assert answer == tokenizer.decode(stock(model, ids), skip_special_tokens=True)


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"repetition_penalty": 1.4}],
    ids=["beams", "lookup", "penalty"],
)
def test_settings_of_generation_pass_through(settings: dict[str, Any]) -> None:
    model, tokenizer = llama()
    ids = random_tokens(1, 40)[0].tolist()
    expected = tokenizer.decode(stock(model, ids, **settings))
    records = headinfer.generate(model, ids, tokenizer=tokenizer, max_new_tokens=12, **settings)
    assert whole(list(records)) == expected


def test_an_end_token_or_time_ends_an_answer() -> None:
    model, tokenizer = llama()
    ids = random_tokens(1, 40)[0].tolist()
    expected = stock(model, ids)

    def last(**settings: Any) -> Generated:
        records = list(headinfer.generate(model, ids, tokenizer=tokenizer, **settings))
        whole(records)
        return records[-1]

    place = expected.index(expected[4])
    assert last(eos_token_id=expected[4]).tokens == place + 1
    assert last(eos_token_id=[expected[4]]).finish_reason == "stop"
    assert last(max_time=1e-9).finish_reason == "time"


@pytest.mark.parametrize("options", DEVICES, ids=["cpu", "simulated"])
def test_what_was_measured_adds_up(options: dict[str, Any]) -> None:
    model, tokenizer = llama()
    ids = random_tokens(1, 40)[0].tolist()
    with headinfer.attach(model, **options) as offload:
        model.generate(random_tokens(1, 90), max_new_tokens=3)  # of no concern to the next call
        stats = offload.stats
        before = stats.prefill_s, stats.decode_s, stats.capture_s
        records = list(headinfer.generate(model, ids, tokenizer=tokenizer, max_new_tokens=12))
        last = records[-1]
        assert last.prefill_s + before[0] == pytest.approx(stats.prefill_s)
        assert last.decode_s + before[1] == pytest.approx(stats.decode_s)
        assert last.capture_s + before[2] == pytest.approx(stats.capture_s)
        plan = offload.session.plan_for(1, 40 + 12)
        assert last.standard_kv_bytes == plan.shape.standard_kv_bytes(40 + 11, 1)
    assert last.prompt_tokens == 40
    assert last.prefill_s * last.prefill_tokens_per_s == pytest.approx(40)
    assert last.decode_s * last.decode_tokens_per_s == pytest.approx(11)
    assert last.capture_s > 0
    assert last.host_kv_bytes >= plan.kv_host_bytes(40)
    assert last.peak_device_kv_bytes == (0 if options["device"] == "cpu" else plan.arena_bytes)
    times = [record.prefill_s + record.decode_s for record in records]
    assert times == sorted(times)
    assert len({record.decode_s for record in records}) > 2


class Gate:
    """A logits processor that counts tokens and stops before one of them until it is opened."""

    def __init__(self, token: int) -> None:
        self.count, self._token = 0, token
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.count == self._token:
            self.reached.set()
            assert self.opened.wait(60)
        return scores


def open_when_closing(gate: Gate) -> None:
    """Open a gate once this thread has begun to wait for the one that runs the model."""

    main = threading.main_thread().ident
    worker = next(t for t in threading.enumerate() if t.name == "headinfer-generate")

    def joining() -> bool:
        frame = sys._current_frames()[main]
        while frame is not None and frame.f_code.co_name != "join":
            frame = frame.f_back
        return frame is not None

    def watch() -> None:
        while worker.is_alive() and not joining():
            worker.join(0.001)
        gate.opened.set()

    threading.Thread(target=watch).start()


@pytest.mark.parametrize("attached", [False, True])
def test_closing_stops_the_model_and_leaves_it_usable(attached: bool) -> None:
    model, tokenizer = llama()
    ids = random_tokens(1, 40)[0].tolist()
    expected, forward = stock(model, ids), model.forward
    gate = Gate(5)
    with headinfer.attach(model) if attached else contextlib.nullcontext():
        records = headinfer.generate(
            model, ids, tokenizer=tokenizer, max_new_tokens=1000, logits_processor=[gate]
        )
        assert next(records).text
        assert gate.reached.wait(60)
        open_when_closing(gate)
        records.close()
        assert gate.count == 5
        assert (owner_of(model) is not None) == attached
        again = list(headinfer.generate(model, ids, tokenizer=tokenizer, max_new_tokens=12))
        assert whole(again) == tokenizer.decode(expected)
    assert owner_of(model) is None
    assert model.forward == forward
    assert stock(model, ids) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="it cannot signal a thread")
def test_an_interrupted_wait_stops_the_model() -> None:
    model, tokenizer = llama()
    gate = Gate(3)

    def interrupt(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if gate.count == 2:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            open_when_closing(gate)
        return scores

    records = headinfer.generate(
        model,
        [5, 6, 7],
        tokenizer=tokenizer,
        max_new_tokens=1000,
        logits_processor=[gate, interrupt],
    )
    with pytest.raises(KeyboardInterrupt):
        list(records)
    assert gate.count <= 3
    assert owner_of(model) is None


@pytest.mark.skipif(sys.platform == "win32", reason="it cannot signal a thread")
def test_an_interrupted_wait_stops_a_prefill_at_its_next_chunk() -> None:
    model, tokenizer = llama()
    gate, told = Gate(1), []

    def progress(done_tokens: int, _all_tokens: int) -> None:
        told.append(done_tokens)
        if done_tokens == 16:
            open_when_closing(gate)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert gate.opened.wait(60)

    ids = random_tokens(1, 100)[0].tolist()
    records = headinfer.generate(model, ids, tokenizer=tokenizer, progress=progress, **SMALL_TILES)
    with pytest.raises(KeyboardInterrupt):
        list(records)
    assert told == [16]
    assert owner_of(model) is None


def test_a_prefill_is_stopped_between_chunks_by_whoever_is_told_of_it() -> None:
    model, tokenizer = llama()
    told = []

    def progress(done_tokens: int, all_tokens: int) -> None:
        told.append((done_tokens, all_tokens))
        if done_tokens >= 32:
            raise RuntimeError("enough")

    ids = random_tokens(1, 100)[0].tolist()
    options = {"tokenizer": tokenizer, **SMALL_TILES}
    with pytest.raises(RuntimeError, match="enough"):
        list(headinfer.generate(model, ids, progress=progress, **options))
    assert told == [(16, 100), (32, 100)]
    assert owner_of(model) is None
    told.clear()
    list(headinfer.generate(model, ids[:20], progress=progress, max_new_tokens=2, **options))
    assert told == [(16, 20), (20, 20)]


def test_what_fails_in_the_model_is_raised_where_records_are_asked_for() -> None:
    model, tokenizer = llama()

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 6:
            raise ArithmeticError("of this test")
        return scores

    records = headinfer.generate(model, [5, 6, 7], tokenizer=tokenizer, logits_processor=[fail])
    read: list[Generated] = []
    with pytest.raises(ArithmeticError, match="of this test"):
        read.extend(records)
    assert [record.tokens for record in read] == [1, 2, 3]
    assert owner_of(model) is None
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(NotANumberError, match="new token 1 are NaN"):
        list(headinfer.generate(model, [5, 6, 7], tokenizer=tokenizer))


def test_two_answers_at_once_are_each_what_they_are_alone() -> None:
    model, tokenizer = llama()
    prompts = [random_tokens(1, 40, seed=seed)[0].tolist() for seed in (1, 2, 3)]
    expected = [tokenizer.decode(stock(model, ids)) for ids in prompts]
    assert len(set(expected)) == 3
    with headinfer.attach(model, **SMALL_TILES) as offload:
        streams = [
            headinfer.generate(model, ids, tokenizer=tokenizer, max_new_tokens=12)
            for ids in prompts
        ]
        begun = [[next(stream)] for stream in streams]
        for records, stream in zip(begun, streams, strict=True):
            records.extend(stream)
        assert [whole(records) for records in begun] == expected
        assert [records[-1].prefill_s * records[-1].prefill_tokens_per_s for records in begun] == (
            pytest.approx([40, 40, 40])
        )
        tokens = offload.stats.prefill_tokens, offload.stats.decode_tokens
        assert tokens == (3 * 40, 3 * 11)


def test_a_model_that_generate_attached_is_for_one_call_at_a_time() -> None:
    model, tokenizer = llama()
    first = headinfer.generate(model, [5, 6, 7], tokenizer=tokenizer, max_new_tokens=8)
    second = headinfer.generate(model, [8, 9], tokenizer=tokenizer, max_new_tokens=8)
    next(first)
    with pytest.raises(UnsupportedModelError, match="another call of generate"):
        next(second)
    assert len(list(first)) == 8
    assert len(list(headinfer.generate(model, [8, 9], tokenizer=tokenizer, max_new_tokens=8))) == 9


def test_nothing_happens_before_the_first_record_is_asked_for() -> None:
    model, tokenizer = llama()
    headinfer.generate(model, [5, 6, 7], tokenizer=tokenizer)
    assert owner_of(model) is None
    headinfer.generate("/no/such/folder", "text")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tile_head": 1}, "no option 'tile_head'"),
        ({"tile_heads": "few"}, "tile_heads must be"),
        ({"disk_cache": "/nowhere"}, "disk_cache '/nowhere' is not there"),
        ({"max_length": 20}, "max_length=20 .* give max_new_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, not 0"),
        ({"num_beams": "two"}, "num_beams must be a whole number of at least 1, not 'two'"),
        ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
        ({"stop_strings": [""]}, "stop_strings must be a text, or several, and none"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 is not served"),
        ({"use_cache": False}, "use_cache=False is not served .*HeadInfer is the cache"),
        ({"streamer": print}, "no option 'streamer'"),
        ({"tokenizer": None}, "a loaded model needs its tokenizer"),
        ({"tokenizer": Path("here")}, "needs its tokenizer, loaded too, which .*here"),
        ({"dtype": "float16"}, "dtype='float16' is for models that are loaded here"),
    ],
)
def test_options_are_refused_at_once(given: dict[str, Any], words: str) -> None:
    model, tokenizer = llama()
    with pytest.raises(OptionError, match=words):
        headinfer.generate(model, "w1", **({"tokenizer": tokenizer} | given))


@pytest.mark.parametrize(
    ("prompt", "given", "words"),
    [
        ("", {}, "makes no tokens"),
        ([], {}, "an empty list"),
        ([{"role": "user", "content": "w1"}], {}, "no chat template"),
        (["w1", "w2"], {}, "must be text, messages"),
        (None, {}, "must be text, messages"),
        ({"role": "user", "content": "w1"}, {}, "must be text, messages"),
        (torch.ones(2, 3, dtype=torch.long), {}, "has 2 rows"),
        ([1, VOCAB], {}, f"token id {VOCAB}, but the model knows ids from 0 to {VOCAB - 1}"),
        ("w1 \udcff", {}, "not UTF-8 text: what stands at character 3"),
        ("w1", {"typical_p": -1.0, "do_sample": True}, "settings do not go: .*typical_p"),
    ],
)
def test_prompts_and_settings_are_refused_with_a_reason(
    prompt: Any, given: dict[str, Any], words: str
) -> None:
    model, tokenizer = llama()
    with pytest.raises(OptionError, match=words):
        list(headinfer.generate(model, prompt, tokenizer=tokenizer, **given))
    assert owner_of(model) is None


def test_options_of_a_model_that_is_attached_are_refused() -> None:
    model, tokenizer = llama()
    with headinfer.attach(model), pytest.raises(OptionError, match=r"attached already.*tile_heads"):
        list(headinfer.generate(model, [5], tokenizer=tokenizer, tile_heads=1))


def test_a_model_that_cannot_be_loaded_says_so() -> None:
    with pytest.raises(HeadInferError, match="neither a folder nor a model id"):
        list(headinfer.generate("/no/such/folder", "text"))


def test_autocast_holds_in_the_thread_of_the_model() -> None:
    model, tokenizer = llama()
    ids = random_tokens(1, 40)[0].tolist()
    dtypes = []
    hook = model.model.layers[0].mlp.register_forward_hook(
        lambda _module, _args, output: dtypes.append(output.dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        expected = stock(model, ids)
        records = list(headinfer.generate(model, ids, tokenizer=tokenizer, max_new_tokens=12))
    hook.remove()
    assert set(dtypes) == {torch.bfloat16}
    assert whole(records) == tokenizer.decode(expected)


@pytest.mark.slow
def test_an_answer_that_nobody_ends_does_not_hold_up_the_interpreter(tmp_path: Path) -> None:
    folder = save_llama(tmp_path, eos_token_id=None, positions=2**20)
    program = f"""
import headinfer
records = headinfer.generate({str(folder)!r}, "w1 w2", max_new_tokens=900_000)
print(next(records).tokens)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=180
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_what_a_tokenizer_returns_is_a_prompt() -> None:
    model, tokenizer = llama()
    for kind in (None, "pt"):
        encoded = tokenizer("w1 w2 w3", return_tensors=kind)
        parts = list(headinfer.generate(model, encoded, tokenizer=tokenizer, max_new_tokens=3))
        plain = list(headinfer.generate(model, "w1 w2 w3", tokenizer=tokenizer, max_new_tokens=3))
        assert [part.text for part in parts] == [part.text for part in plain]
