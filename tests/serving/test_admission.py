"""What cannot fit is refused at once with the arithmetic; what may fit later waits."""

import threading

import pytest
from desk_helpers import PATIENCE_S, Heard, answer, ask, desk_of, stock_text, tokens

import headinfer
from headinfer.errors import MemoryPlanError, OptionError
from headinfer.serving.events import Event, Piece
from tiny_models import shared_model

PER_TOKEN = 3 * 4 * 2 * 16 * 4


def test_more_tokens_than_the_model_has_positions_are_refused() -> None:
    with desk_of("llama3") as desk:
        with pytest.raises(OptionError, match=r"2,048 tokens .* 1, 2,049 .* for 2,048; shorten"):
            desk.check(ask(tokens(2048), 1))
        with pytest.raises(OptionError, match="ask for 48 new tokens at most"):
            desk.submit(ask(tokens(2000), 49), Heard())
        desk.check(ask(tokens(2000), 48))
        assert desk._served.session.stats.prefill_tokens == 0
    with desk_of("llama3", allow_long_prompts=True) as desk:
        desk.check(ask(tokens(3000), 49))


def test_what_cpu_memory_never_holds_is_refused_with_what_would_fit() -> None:
    with desk_of("llama3", options={"host_memory": f"{1024 * PER_TOKEN}B"}) as desk:
        with pytest.raises(MemoryPlanError, match=r"1,100 tokens need 1.61 MiB .*1.50 MiB .* 1K"):
            desk.check(ask(tokens(1000), 100))
        heard = answer(desk, ask(tokens(1000), 24))
        assert heard.text == stock_text("llama3", tokens(1000), 24)
        desk.check(ask(tokens(1000, seed=5), 24))  # what is kept will yield


def test_what_would_fit_is_told_without_the_room_for_raw_pages() -> None:
    options = {"device": "simulated", "kv_cache": "fp8", "device_memory": "1GiB"}
    with desk_of("llama3", options=options, allow_long_prompts=True) as desk:
        plan = desk._served.session.plan
        assert plan.raw_page_bytes
        there = plan.kv_host_bytes(1024)
    options["host_memory"] = f"{there}B"
    with desk_of("llama3", options=options, allow_long_prompts=True) as desk:
        desk.check(ask(tokens(1000), 24))
        with pytest.raises(MemoryPlanError, match=r"1K tokens fit"):
            desk.check(ask(tokens(1000), 100))


def test_a_request_waits_for_the_memory_of_one_that_runs() -> None:
    begun, go_on = threading.Event(), threading.Event()
    slow, heard = Heard(), Heard()

    def hear(event: Event) -> None:
        slow(event)
        if isinstance(event, Piece):
            begun.set()
            assert go_on.wait(PATIENCE_S)

    with desk_of("llama3", options={"host_memory": f"{1024 * PER_TOKEN}B"}, running=2) as desk:
        first = desk.submit(ask(tokens(600), 4), hear)
        assert begun.wait(PATIENCE_S)
        second = desk.submit(ask(tokens(700, seed=3), 4), heard)
        assert second.wait(1.0) is None
        assert heard.events == []
        third = desk.submit(ask(tokens(100, seed=4), 4), Heard())
        third.cancel()
        go_on.set()
        assert first.wait(PATIENCE_S)
        assert second.wait(PATIENCE_S)
        assert third.wait(PATIENCE_S)
    assert slow.text == stock_text("llama3", tokens(600), 4)
    assert heard.text == stock_text("llama3", tokens(700, seed=3), 4)


def test_what_the_gpu_never_holds_is_refused() -> None:
    small = {"chunk_tokens": 16, "tile_tokens": "all", "tile_heads": 1, "resident_tokens": 0}
    model = shared_model("llama3")
    options = {"device": "simulated", "device_memory": "1GiB", **small}
    with headinfer.attach(model, **options) as offload:
        least = offload.plan.total_device_bytes
    options = {"device": "simulated", "device_memory": f"{least}B", **small}
    with desk_of("llama3", options=options, allow_long_prompts=True) as desk:
        desk.check(ask(tokens(20), 4))
        with pytest.raises(MemoryPlanError, match=r"device memory|GPU memory"):
            desk.check(ask(tokens(9000), 40))
