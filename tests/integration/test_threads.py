"""Several threads on one attached model, each with a cache of its own."""

import functools
import threading
import weakref
from collections.abc import Callable

import pytest
import torch

import headinfer
from headinfer.device.simulated import SimulatedDevice
from headinfer.errors import CacheStateError
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens, shared_model, tiny_model


def run_threads(count: int, work: Callable[[int], None]) -> list[BaseException]:
    """Run `work` in so many threads at once, and return what they failed with."""
    failures: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            work(number)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "some thread waits for ever"
    return failures


def generate(model: torch.nn.Module, prompt: torch.Tensor, **arguments: object) -> torch.Tensor:
    return model.generate(prompt, max_new_tokens=8, do_sample=False, **arguments)  # type: ignore[operator,no-any-return]


@functools.cache
def prompts() -> list[torch.Tensor]:
    return [random_tokens(1, 21 + 6 * number, seed=number) for number in range(6)]


@functools.cache
def stock_answers(name: str) -> list[torch.Tensor]:
    return [generate(shared_model(name), prompt) for prompt in prompts()]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_threads_with_caches_of_their_own_do_not_meet(name: str, device: str) -> None:
    model, stock = shared_model(name), stock_answers(name)
    answers: dict[tuple[int, int], torch.Tensor] = {}
    rounds = 3
    with headinfer.attach(model, device=device, tile_tokens=8, chunk_tokens=7) as offload:

        def work(number: int) -> None:
            for attempt in range(rounds):
                cache = offload.new_cache()
                answers[number, attempt] = generate(
                    model, prompts()[number], **cache_argument(model, cache)
                )

        assert run_threads(len(prompts()), work) == []
        stats = offload.stats
    for (number, _), answer in answers.items():
        assert torch.equal(answer, stock[number])
    assert len(answers) == rounds * len(prompts())
    assert stats.prefill_tokens == rounds * sum(prompt.shape[1] for prompt in prompts())
    assert stats.decode_tokens == rounds * len(prompts()) * 7


def test_threads_that_take_each_others_memory_and_change_their_caches() -> None:
    """Beams, rows, crops and resets happen beside a call; residents are given up in another's."""
    model = shared_model("llama3")
    tokens = random_tokens(1, 40)
    stock = model(tokens).logits
    beams = model.generate(tokens, max_new_tokens=5, num_beams=3, do_sample=False)
    with headinfer.attach(model, device="simulated", tile_tokens=8, chunk_tokens=16) as sized:
        enough = sized.session.plan_for(3, 300).total_device_bytes
    with headinfer.attach(
        model, device="simulated", device_memory=f"{2 * enough}B", tile_tokens=8, chunk_tokens=16
    ) as offload:

        def work(number: int) -> None:
            for _ in range(3):
                cache = offload.new_cache()
                if number % 2:
                    answer = model.generate(
                        tokens,
                        max_new_tokens=5,
                        num_beams=3,
                        do_sample=False,
                        **cache_argument(model, cache),
                    )
                    assert torch.equal(answer, beams)
                    continue
                model(tokens[:, :33], **cache_argument(model, cache))
                cache.crop(-13)
                assert cache.get_seq_length() == 20
                cache.batch_repeat_interleave(2)
                both = tokens.repeat(2, 1)
                ours = model(both[:, 20:], **cache_argument(model, cache)).logits
                torch.testing.assert_close(ours, stock[:, 20:].repeat(2, 1, 1))
                cache.reset()
                ours = model(both, **cache_argument(model, cache)).logits
                torch.testing.assert_close(ours, stock.repeat(2, 1, 1))
                cache.close()

        assert run_threads(4, work) == []


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_an_interrupted_thread_leaves_the_others_their_turns(device: str) -> None:
    model, stock = tiny_model("llama3"), stock_answers("llama3")
    interrupted = threading.local()

    def interrupt(*_: object) -> None:
        interrupted.calls = getattr(interrupted, "calls", 0) + 1
        if getattr(interrupted, "here", False) and interrupted.calls == 5:
            raise KeyboardInterrupt

    model.model.layers[1].register_forward_pre_hook(interrupt)
    with headinfer.attach(model, device=device, tile_tokens=8, chunk_tokens=7) as offload:

        def work(number: int) -> None:
            interrupted.here = number == 0
            answer = generate(
                model, prompts()[number], **cache_argument(model, offload.new_cache())
            )
            assert torch.equal(answer, stock[number])

        failures = run_threads(4, work)
        assert [type(failure) for failure in failures] == [KeyboardInterrupt]
        failures.clear()
        assert run_threads(3, lambda number: work(number + 1)) == []


def test_threads_without_a_cache_of_ours_are_served_too() -> None:
    model, stock = shared_model("llama3"), stock_answers("llama3")
    with headinfer.attach(model) as offload:

        def work(number: int) -> None:
            own = cache_argument(model, offload.new_cache()) if number % 2 else {}
            assert torch.equal(generate(model, prompts()[number], **own), stock[number])

        assert run_threads(4, work) == []


def test_two_threads_with_one_cache_append_one_after_the_other() -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 20)
    with headinfer.attach(model, device="simulated") as offload:
        cache = offload.new_cache()
        assert run_threads(2, lambda _: model(tokens, **cache_argument(model, cache))) == []
        assert cache.get_seq_length() == 40
        ours = model(tokens, **cache_argument(model, cache)).logits
    stock = model(tokens.repeat(1, 3)).logits[:, 40:]
    torch.testing.assert_close(ours, stock)


def test_detaching_waits_for_the_call_of_another_thread() -> None:
    model = tiny_model("llama3")
    tokens = random_tokens(1, 20)
    stock = model(tokens).logits
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        inside.set()
        assert go_on.wait(60)

    results: list[torch.Tensor] = []
    offload = headinfer.attach(model)
    handle = model.model.layers[1].register_forward_pre_hook(pause)
    caller = threading.Thread(
        target=lambda: results.append(
            model(tokens, **cache_argument(model, offload.new_cache())).logits
        ),
        daemon=True,
    )
    caller.start()
    assert inside.wait(60)
    handle.remove()
    detacher = threading.Thread(target=offload.detach, daemon=True)
    detacher.start()
    detacher.join(0.2)
    assert detacher.is_alive()
    go_on.set()
    caller.join(60)
    detacher.join(60)
    torch.testing.assert_close(results[0], stock)
    assert torch.equal(model(tokens).logits, stock)  # detached


def test_a_call_within_a_call_works_with_another_cache_and_not_with_the_same() -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 60)
    stock = model(tokens).logits
    seen: list[torch.Tensor] = []
    inner = threading.Lock()

    def progress(_done: int, _all: int) -> None:
        if inner.acquire(blocking=False):  # not again for the calls it makes
            seen.append(model(tokens, **cache_argument(model, offload.new_cache())).logits)
            inner.release()

    with headinfer.attach(
        model, device="simulated", tile_tokens=8, chunk_tokens=16, progress=progress
    ) as offload:
        ours = model(tokens, **cache_argument(model, offload.new_cache())).logits
        torch.testing.assert_close(ours, stock)
        assert len(seen) > 2
        for logits in seen:
            torch.testing.assert_close(logits, stock)

        cache = offload.new_cache()
        handle = model.model.layers[1].register_forward_pre_hook(
            lambda *_: model(tokens[:, :3], **cache_argument(model, cache))
        )
        try:
            with pytest.raises(CacheStateError, match="a call under way is using"):
                model(tokens[:, :10], **cache_argument(model, cache))
        finally:
            handle.remove()


def test_a_call_within_a_call_may_take_the_memory_of_the_one_under_way() -> None:
    model = shared_model("llama3")
    tokens = random_tokens(1, 60)
    stock = model(tokens).logits
    options = {"device": "simulated", "tile_tokens": 8, "chunk_tokens": 16}
    with headinfer.attach(model, **options) as sized:
        enough = sized.session.plan_for(1, 2000).total_device_bytes
    inner: list[OffloadedCache] = []

    def call(*_: object) -> None:
        if not inner:
            inner.append(offload.new_cache(max_tokens=2000))
            logits = model(tokens, **cache_argument(model, inner[0])).logits
            torch.testing.assert_close(logits, stock)

    with headinfer.attach(model, device_memory=f"{int(1.3 * enough)}B", **options) as offload:
        cache = offload.new_cache()
        model(tokens[:, :40], **cache_argument(model, cache))
        assert cache.state.engine.plan.resident_tokens
        handle = model.model.layers[1].register_forward_pre_hook(call)
        try:
            ours = model(tokens[:, 40:], **cache_argument(model, cache)).logits
        finally:
            handle.remove()
        assert not cache.state.engine.plan.resident_tokens
    torch.testing.assert_close(ours, stock[:, 40:])


def test_a_model_is_not_detached_from_within_its_call() -> None:
    model = tiny_model("llama3")
    tokens = random_tokens(1, 10)
    with headinfer.attach(model) as offload:
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: offload.detach())
        with pytest.raises(CacheStateError, match="from within a call"):
            model(tokens, **cache_argument(model, offload.new_cache()))
        handle.remove()
        model(tokens, **cache_argument(model, offload.new_cache()))


def test_caches_dropped_beside_a_call_free_their_memory() -> None:
    model, device = tiny_model("llama3"), SimulatedDevice()
    tokens = random_tokens(1, 40)
    dropped: list[OffloadedCache] = []

    def drop_from_elsewhere(*_: object) -> None:
        thread = threading.Thread(target=dropped.clear)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
        assert engine() is not None, "it died beside a call"

    with headinfer.attach(
        model, device="simulated", simulated_device=device, tile_tokens=8, chunk_tokens=16
    ) as offload:
        dropped.append(offload.new_cache())
        model(tokens, **cache_argument(model, dropped[0]))
        engine = weakref.ref(dropped[0].state.engine)
        one = device.allocated_bytes
        model.model.layers[1].register_forward_pre_hook(drop_from_elsewhere)
        cache = offload.new_cache()
        model(tokens, **cache_argument(model, cache))
        assert engine() is None
        assert device.allocated_bytes == one


@pytest.mark.gpu
@pytest.mark.parametrize("host_attention", [0.5, "off"])
@pytest.mark.parametrize("own_streams", [False, True])
def test_threads_on_a_gpu(host_attention: float | str, own_streams: bool) -> None:
    model = tiny_model("llama3").cuda()
    given = [random_tokens(1, 200 + 30 * number, seed=number).cuda() for number in range(6)]
    stock = [generate(model, prompt) for prompt in given]
    with headinfer.attach(
        model,
        chunk_tokens=64,
        tile_tokens=32,
        resident_tokens=50,
        host_attention=host_attention,
    ) as offload:

        def work(number: int) -> None:
            current = torch.cuda.current_stream()
            with torch.cuda.stream(torch.cuda.Stream() if own_streams else current):
                for _ in range(3):
                    cache = cache_argument(model, offload.new_cache())
                    assert torch.equal(generate(model, given[number], **cache), stock[number])

        assert run_threads(len(given), work) == []
