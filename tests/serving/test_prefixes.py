"""Prefixes that are kept: what is read again, and that nothing of it is wrong."""

import threading
import time
from typing import Any

import pytest
from desk_helpers import PATIENCE_S, Heard, answer, ask, desk_of, stock_text, tokens

from headinfer.serving.desk import Desk
from headinfer.serving.events import Event, Piece, Progress

MODELS = ["llama3", "gemma3", "mistral-sliding", "qwen3-next"]
DEVICES: dict[str, dict[str, Any]] = {
    "cpu": {"device": "cpu"},
    "simulated": {"device": "simulated", "resident_tokens": 20},
}


def check(desk: Desk, name: str, ids: tuple[int, ...], new_tokens: int = 6, **given: Any) -> Heard:
    """Ask, hold the answer against stock's, and return what was heard."""
    heard = answer(desk, ask(ids, new_tokens, **given))
    assert heard.text == stock_text(name, ids, new_tokens)
    usage = heard.ended.usage
    assert heard.progress[0].processed == heard.progress[0].cached == usage.cached_tokens
    return heard


def cached(heard: Heard) -> int:
    return heard.ended.usage.cached_tokens


@pytest.mark.covering
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_a_conversation_reads_only_what_is_new(name: str, device: str) -> None:
    ids, held = tokens(120), 0
    with desk_of(name, options=DEVICES[device]) as desk:
        for turn in range(3):
            heard = check(desk, name, ids, logprobs=0)
            assert cached(heard) == held
            said = [score.token_id for piece in heard.pieces for score in piece.tokens]
            held = len(ids) + len(said) - 1  # the last token of an answer is not read
            ids = (*ids, *said, *tokens(20, seed=turn + 5))
        assert len([each for each in desk.slots() if each.state == "kept"]) >= 1


@pytest.mark.covering(most=3)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_questions_about_one_text_share_it(name: str, device: str) -> None:
    """A model that cannot go back has snapshots, and one more where prompts have parted before."""
    text = tokens(200)
    with desk_of(name, options=DEVICES[device]) as desk:
        check(desk, name, (*text, *tokens(15, seed=3)))
        second = check(desk, name, (*text, *tokens(25, seed=4)))
        third = check(desk, name, (*text, *tokens(35, seed=5)))
        again = check(desk, name, (*text, *tokens(15, seed=3)))
    goes_back = name == "llama3"
    assert cached(second) == 200 if goes_back else 150 <= cached(second) <= 200
    assert cached(third) == 200
    assert cached(again) == (200 if name == "qwen3-next" else 214)


def test_what_is_kept_counts_without_what_its_answer_had_reserved() -> None:
    with desk_of("llama3") as desk:
        answer(desk, ask(tokens(40), 440, given={"max_time": 0.05}))
        (kept,) = desk.slots()
        per_token = desk._served.session.plan.kv_host_bytes(1)
        assert kept.tokens * per_token <= kept.host_bytes <= 2.5 * (kept.tokens + 64) * per_token


@pytest.mark.parametrize("name", ["gemma3", "qwen3-next"])
def test_marks_are_where_messages_end(name: str) -> None:
    text = tokens(100)
    with desk_of(name) as desk:
        check(desk, name, (*text, *tokens(45, seed=3)), marks=(37, 100))
        assert cached(check(desk, name, (*text, *tokens(25, seed=4)))) == 100
        assert cached(check(desk, name, (*text[:37], *tokens(25, seed=8)))) == 37


class Hanging(Heard):
    """A client that hangs up after some progress."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens
        self._known = threading.Event()

    def ask(self, desk: Desk, asked: Any) -> None:
        self._ticket = desk.submit(asked, self)
        self._known.set()
        assert self._ticket.wait(PATIENCE_S)

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if isinstance(event, Progress) and event.processed >= self._tokens:
            assert self._known.wait(PATIENCE_S)
            self._ticket.cancel()


@pytest.mark.covering
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_a_cancelled_prompt_goes_on_where_it_was(name: str, device: str) -> None:
    ids = tokens(300)
    with desk_of(name, options=DEVICES[device]) as desk:
        first = Hanging(100)
        first.ask(desk, ask(ids))
        assert first.ended.finish_reason == "cancelled"
        read = first.progress[-1].processed
        assert 100 <= read < 200
        session = desk._served.session
        before = session.stats.prefill_tokens
        second = check(desk, name, ids)
        assert read <= cached(second) < 200
        assert session.stats.prefill_tokens - before == 300 - cached(second)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_waits_for_the_first_chunk_of_one_that_was_hung_up(name: str) -> None:
    ids, reading, go_on = tokens(300), threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        if not reading.is_set():
            reading.set()
            assert go_on.wait(PATIENCE_S)

    with desk_of(name, options={"chunk_tokens": 64}) as desk:
        check(desk, name, (*ids[:20], *tokens(30, seed=6)))
        embedding = desk._served.model.get_input_embeddings()
        hook = embedding.register_forward_pre_hook(hold)
        first, second = Heard(), Heard()
        hung_up = desk.submit(ask(ids), first)
        assert reading.wait(PATIENCE_S)
        hung_up.cancel()
        again = desk.submit(ask(ids, 6), second)
        time.sleep(0.2)  # in which it would take what is kept
        go_on.set()
        assert again.wait(PATIENCE_S)
        hook.remove()
    assert first.ended.finish_reason == "cancelled"
    assert second.text == stock_text(name, ids, 6)
    # A chunk of a model that cannot go back ends where another prompt parted.
    assert (20 if name == "qwen3-next" else 64) <= cached(second) < 300


def test_a_prefix_is_shared_with_one_that_runs() -> None:
    text = tokens(160)
    others: list[Any] = []
    heard = [Heard() for _ in range(3)]

    def begin(event: Event) -> None:
        reading(event)
        if isinstance(event, Piece) and not others:
            others.extend(
                desk.submit(ask((*text, *tokens(10, seed=number))), one)
                for number, one in enumerate(heard)
            )

    reading = Heard()
    with desk_of("llama3", running=4) as desk:
        assert desk.submit(ask(text, 60), begin).wait(PATIENCE_S)
        assert all(each.wait(PATIENCE_S) for each in others)
    assert reading.text == stock_text("llama3", text, 60)
    for number, one in enumerate(heard):
        assert one.text == stock_text("llama3", (*text, *tokens(10, seed=number)))
        assert cached(one) == 160


@pytest.mark.slow
def test_what_few_tokens_share_does_not_hold_the_memory_of_many() -> None:
    with desk_of("llama3") as desk:
        check(desk, "llama3", tokens(1500))
        heard = check(desk, "llama3", (*tokens(1500)[:100], *tokens(30, seed=7)))
        assert cached(heard) == 100
        kept = sorted(each.host_bytes for each in desk.slots() if each.state == "kept")
        assert kept[0] < kept[1] / 2


def wait_until(true: Any) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_memory_of_kept_prefixes_is_bounded_and_the_last_used_stay() -> None:
    per_token = 3 * 4 * 2 * 16 * 4  # layers, heads, keys and values, dim, bytes
    with desk_of("llama3", kept_memory=f"{700 * per_token}B") as desk:
        for seed in range(6):
            check(desk, "llama3", tokens(200, seed=seed))
        shelf = desk._served.prefixes._shelf
        wait_until(lambda: shelf.kept_bytes <= 700 * per_token)
        kept = [each for each in desk.slots() if each.state == "kept"]
        assert 2 <= len(kept) <= 3
        assert sum(each.host_bytes for each in kept) <= 700 * per_token
        assert cached(check(desk, "llama3", (*tokens(200, seed=5), 9))) == 200
        assert cached(check(desk, "llama3", (*tokens(200, seed=0), 9))) == 0


def test_kept_prefixes_yield_to_a_request_that_needs_memory() -> None:
    with desk_of("llama3", options={"host_memory": "3MiB"}, kept_memory="1GiB") as desk:
        for seed in range(4):
            check(desk, "llama3", tokens(300, seed=seed))
        heard = check(desk, "llama3", tokens(1500, seed=9))
        assert heard.ended.error is None
        assert len([each for each in desk.slots() if each.state == "kept"]) < 5


def test_a_model_whose_rotary_table_follows_the_length_keeps_nothing() -> None:
    import torch

    import headinfer
    from saved_models import make_tokenizer
    from tiny_models import VOCAB, tiny_model

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = tiny_model("llama3", max_position_embeddings=64, rope_parameters=rope)
    ids = tokens(100)
    stock = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)
    with headinfer.attach(model, device="cpu", chunk_tokens=16):
        desk = Desk(model, make_tokenizer(VOCAB), allow_long_prompts=True)
        for _ in range(2):
            heard = answer(desk, ask(ids, 5, given={"repetition_penalty": 1.0}))
            assert heard.text == make_tokenizer(VOCAB).decode(stock[0, 100:])
            assert cached(heard) == 0
        desk.close(timeout_s=PATIENCE_S)
