"""Requests of several clients: their answers, their places, their ends."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from desk_helpers import PATIENCE_S, Heard, answer, ask, desk_of, stock_text, tokens

from headinfer.errors import DeskClosedError, HeadInferError, OptionError, QueueFullError
from headinfer.serving.desk import Desk, Ticket
from headinfer.serving.events import Event, Piece, Progress
from saved_models import make_tokenizer
from tiny_models import VOCAB, shared_model


@pytest.fixture
def desk() -> Iterator[Desk]:
    with desk_of("llama3", running=4) as opened:
        yield opened


def test_an_answer_is_stock_s_and_told_in_order(desk: Desk) -> None:
    ids = tokens(50)
    heard = answer(desk, ask(ids))
    assert heard.text == stock_text("llama3", ids)
    assert heard.ended.finish_reason == "length"
    usage = heard.ended.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (50, 0, 8)
    assert usage.prefill_s > 0
    assert usage.decode_s > 0
    assert [each.processed for each in heard.progress] == [0, 16, 32, 48, 50]
    assert all((each.total, each.cached) == (50, 0) for each in heard.progress)
    kinds = [type(event) for event in heard.events]
    assert kinds.index(Piece) > max(at for at, kind in enumerate(kinds) if kind is Progress)
    assert len(heard.threads) == 1
    assert threading.get_ident() not in heard.threads
    assert not any(each.name.startswith("headinfer-request") for each in threading.enumerate())


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen3-next"])
def test_requests_at_once_do_not_meet(name: str) -> None:
    prompts = [tokens(20 + 9 * number, seed=number) for number in range(6)]
    with desk_of(name, running=3) as desk:
        heard = [Heard() for _ in prompts]
        tickets = [desk.submit(ask(ids), one) for ids, one in zip(prompts, heard, strict=True)]
        assert all(ticket.wait(PATIENCE_S) is not None for ticket in tickets)
    assert [one.text for one in heard] == [stock_text(name, ids) for ids in prompts]


def test_a_seed_gives_the_same_tokens_whatever_else_runs(desk: Desk) -> None:
    """They are those of stock transformers with that seed, alone on its generator."""
    ids, sampled = tokens(30), {"do_sample": True, "temperature": 1.3, "top_k": 40}
    torch.manual_seed(11)
    stock = stock_text("llama3", ids, 12, **sampled)
    heard = [Heard() for _ in range(8)]
    before = torch.get_rng_state()
    tickets = [
        desk.submit(ask(ids, 12, given=sampled, seed=11 if number % 2 else number), one)
        for number, one in enumerate(heard)
    ]
    assert all(ticket.wait(PATIENCE_S) for ticket in tickets)
    assert {one.text for one in heard[1::2]} == {stock}
    assert len({one.text for one in heard[::2]}) == 4
    assert torch.equal(torch.get_rng_state(), before), "somebody drew from the global generator"


def test_without_a_seed_answers_differ(desk: Desk) -> None:
    sampled = {"do_sample": True, "temperature": 2.0}
    texts = {answer(desk, ask(tokens(30), 12, given=sampled)).text for _ in range(3)}
    assert len(texts) == 3


def test_answers_go_on_while_another_prompt_is_read(desk: Desk) -> None:
    """A turn is passed on after each chunk; who answers has as long as the chunk took."""
    long, short = tokens(1500), tokens(20, seed=2)
    others: list[Ticket] = []
    heard = Heard()

    def begin(event: Event) -> None:
        if isinstance(event, Progress) and event.processed == 32:
            others.append(desk.submit(ask(short, 12), heard))
        reading.events.append(event)
        if others and others[0].wait(0):
            ended_at.append(len(reading.progress))

    reading, ended_at = Heard(), list[int]()
    assert desk.submit(ask(long, 3), begin).wait(PATIENCE_S)
    assert heard.text == stock_text("llama3", short, 12)
    assert reading.text == stock_text("llama3", long, 3)
    assert ended_at[0] < len(reading.progress) - 20
    assert reading.ended.usage.prefill_s > 0


def test_the_queue_tells_places_and_is_bounded() -> None:
    begin, go_on = threading.Event(), threading.Event()

    def slow(event: Event) -> None:
        if isinstance(event, Progress):
            begin.set()
            assert go_on.wait(PATIENCE_S)

    with desk_of("llama3", running=1, waiting=2) as desk:
        first = desk.submit(ask(tokens(20)), slow)
        assert begin.wait(PATIENCE_S)
        heard = [Heard(), Heard()]
        tickets = [desk.submit(ask(tokens(20, seed=3)), one) for one in heard]
        with pytest.raises(QueueFullError, match="with 1 request running and 2 waiting"):
            desk.submit(ask(tokens(20)), Heard())
        states = [(slot.state, slot.position) for slot in desk.slots()]
        assert states == [("running", None), ("waiting", 0), ("waiting", 1)]
        go_on.set()
        assert all(ticket.wait(PATIENCE_S) for ticket in (first, *tickets))
    assert heard[0].places in ([0], [])  # a thread may begin only after it may run
    assert heard[1].places in ([1, 0], [1], [0], [])
    assert [one.text for one in heard] == [stock_text("llama3", tokens(20, seed=3))] * 2


def test_one_that_waits_is_cancelled_at_once() -> None:
    begin, go_on = threading.Event(), threading.Event()

    def slow(event: Event) -> None:
        begin.set()
        assert go_on.wait(PATIENCE_S)

    with desk_of("llama3", running=1) as desk:
        first = desk.submit(ask(tokens(20)), slow)
        assert begin.wait(PATIENCE_S)
        heard = Heard()
        second = desk.submit(ask(tokens(20)), heard)
        second.cancel()
        assert second.wait(PATIENCE_S) is not None
        assert heard.ended.finish_reason == "cancelled"
        assert not first.wait(0)
        go_on.set()
        assert first.wait(PATIENCE_S)


class Leaver(Heard):
    """One that cancels once it has heard enough."""

    def __init__(self, desk: Desk, kind: type, count: int) -> None:
        super().__init__()
        self._kind, self._count = kind, count
        self.ticket = threading.Event()
        self.cancel = lambda: None

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        assert self.ticket.wait(PATIENCE_S)
        if sum(isinstance(each, self._kind) for each in self.events) == self._count:
            self.cancel()


@pytest.mark.parametrize(("kind", "count"), [(Progress, 1), (Progress, 2), (Piece, 2)])
def test_a_cancelled_request_stops_between_chunks_and_tokens(
    desk: Desk, kind: type, count: int
) -> None:
    leaver = Leaver(desk, kind, count)
    ticket = desk.submit(ask(tokens(200), 60), leaver)
    leaver.cancel = ticket.cancel
    leaver.ticket.set()
    assert ticket.wait(PATIENCE_S)
    assert leaver.ended.finish_reason == "cancelled"
    assert leaver.ended.usage.completion_tokens < 10
    if kind is Progress:
        assert leaver.progress[-1].processed < 100
    assert answer(desk, ask(tokens(40))).text == stock_text("llama3", tokens(40))


def test_a_client_that_fails_cancels_its_own_request_alone(desk: Desk) -> None:
    def fail(event: Event) -> None:
        raise OSError("the pipe is broken")

    ended = desk.submit(ask(tokens(60)), fail).wait(PATIENCE_S)
    assert ended is not None
    assert ended.finish_reason == "cancelled"
    assert answer(desk, ask(tokens(40))).text == stock_text("llama3", tokens(40))


def test_a_stop_string_ends_the_text_and_is_named(desk: Desk) -> None:
    words = stock_text("llama3", tokens(50), 8).split()
    at = next(at for at, word in enumerate(words) if at and word not in words[:at])
    heard = answer(desk, ask(tokens(50), stop=("never", words[at])))
    assert heard.text.split() == words[:at]
    assert (heard.ended.finish_reason, heard.ended.stop) == ("stop", words[at])


@pytest.mark.parametrize("given", [{}, {"prompt_lookup_num_tokens": 3}])
def test_log_probabilities_are_those_of_the_model(desk: Desk, given: dict[str, int]) -> None:
    ids = tokens(10) * 4
    heard = answer(desk, ask(ids, 5, logprobs=3, given=given))
    scores = [score for piece in heard.pieces for score in piece.tokens]
    assert len(scores) == 5
    rows = torch.tensor([[*ids, *(score.token_id for score in scores)]])
    logprobs = shared_model("llama3")(rows).logits[0].log_softmax(-1)
    for at, score in enumerate(scores):
        own = logprobs[len(ids) - 1 + at]
        assert score.logprob == pytest.approx(own[score.token_id].item(), abs=1e-4)
        best = own.topk(3)
        assert [each for each, _, _ in score.top] == best.indices.tolist()
        assert [value for _, _, value in score.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert score.text == make_tokenizer(VOCAB).decode([score.token_id])


def test_processors_are_made_for_each_answer(desk: Desk) -> None:
    made: list[int] = []

    def only_seven(_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([7]), 0.0)

    def make() -> list:
        made.append(1)
        return [only_seven]

    for _ in range(2):
        assert answer(desk, ask(tokens(20), 3, processors=make)).text == "w1 w1 w1"
    assert len(made) == 2


def test_an_answer_may_run_out_of_time(desk: Desk) -> None:
    heard = answer(desk, ask(tokens(20), 500, given={"max_time": 1e-6}))
    assert heard.ended.finish_reason == "time"


def test_what_cannot_be_served_is_refused_at_once(desk: Desk) -> None:
    for wrong, told in [
        (ask(()), "no tokens"),
        (ask((5, VOCAB)), f"token id {VOCAB}"),
        (ask((5,), given={"num_beams": 2}), "num_beams"),
        (ask((5,), given={"max_length": 2}), "max_new_tokens"),
        (ask((5,), given={"colour": 2}), "colour"),
        (ask((5,), stop=("",)), "some text"),
        (ask((5,), logprobs=101), "0 to 100"),
        (ask((5,), seed=2**64), "must be a whole number from"),
    ]:
        with pytest.raises(OptionError, match=told):
            desk.check(wrong)
        with pytest.raises(OptionError, match=told):
            desk.submit(wrong, Heard())


def test_what_fails_in_a_request_is_told_and_harms_no_other(desk: Desk) -> None:
    def broken() -> list:
        return [lambda _ids, _scores: 1 / 0]

    heard = answer(desk, ask(tokens(20), processors=broken))
    assert heard.ended.finish_reason == "error"
    assert isinstance(heard.ended.error, HeadInferError)
    assert "ZeroDivisionError" in str(heard.ended.error)
    assert answer(desk, ask(tokens(40))).text == stock_text("llama3", tokens(40))


def test_a_desk_that_closes_cancels_and_takes_no_more() -> None:
    with desk_of("llama3", running=1) as desk:
        heard = [Heard() for _ in range(3)]
        tickets = [desk.submit(ask(tokens(300), 400), one) for one in heard]
        desk.close(timeout_s=PATIENCE_S)
        assert [ticket.wait(0).finish_reason for ticket in tickets] == ["cancelled"] * 3  # type: ignore[union-attr]
        with pytest.raises(DeskClosedError):
            desk.submit(ask(tokens(20)), Heard())
        assert desk.slots() == []
    assert not any(each.name.startswith("headinfer-request") for each in threading.enumerate())


def test_a_closed_desk_leaves_the_model_as_it_was() -> None:
    model = shared_model("llama3")
    before, forward = set(model.__dict__), model.forward
    with desk_of("llama3") as desk:
        answer(desk, ask(tokens(40)))
        desk.close(timeout_s=PATIENCE_S)
        desk.close(timeout_s=PATIENCE_S)
        assert set(model.__dict__) == before
        assert model.forward == forward


def test_a_desk_that_cannot_close_in_time_says_so_and_returns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begin, go_on = threading.Event(), threading.Event()

    def stuck(event: Event) -> None:
        begin.set()
        assert go_on.wait(PATIENCE_S)

    with desk_of("llama3") as desk:
        desk.submit(ask(tokens(20)), stuck)
        assert begin.wait(PATIENCE_S)
        assert not desk.close(timeout_s=0.2)
        assert "requests that still run: 1" in caplog.text
        go_on.set()


def test_what_a_request_read_that_ended_late_is_saved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begin, go_on = threading.Event(), threading.Event()

    def stuck(event: Event) -> None:
        if isinstance(event, Progress) and event.processed:
            begin.set()
            assert go_on.wait(PATIENCE_S)

    with desk_of("llama3", session_folder=tmp_path) as desk:
        prefixes = desk._served.prefixes
        close = prefixes.close

        def closing(timeout_s: float) -> None:
            close(timeout_s)
            go_on.set()  # the request ends only now

        monkeypatch.setattr(prefixes, "close", closing)
        desk.submit(ask(tokens(300)), stuck)
        assert begin.wait(PATIENCE_S)
        assert desk.close(timeout_s=4.0)
    assert any(tmp_path.glob("*.hsession"))
