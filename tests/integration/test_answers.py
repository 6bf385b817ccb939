"""Caches whose answers have resident tokens where the prompt's activations were."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import headinfer
from answering_caches import (
    LONG,
    PROMPT,
    RESIDENT,
    SHORT,
    SIZES,
    Chat,
    attached,
    device_memory,
    long_model,
)
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.balance import Settled
from headinfer.errors import MemoryPlanError
from headinfer.integration import parts
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.parts import USED_SHARE
from headinfer.offload import Offload
from headinfer.plan import predict
from headinfer.plan.format import Format
from headinfer.plan.memory import (
    CUDA_GRAPHS_BYTES,
    CUDA_OUTSIDE_BYTES,
    activation_bytes,
    resident_bytes,
)
from headinfer.schedule import route
from measurements import WITH_GPU
from parted import spread
from shared_device import SharedDevice
from tiny_models import random_tokens, tiny_model

APART = {"dense": 1e-3, "packed": 2**-6}
"""How far logits may be from those of stock transformers, of float32 and of bfloat16."""

MANY = 40
"""Steps that are enough for any change of plans here."""


def answering(model: Any, offload: Any, *beside: Chat, seed: int = 0) -> Chat:
    """Return a cache under a plan for answers."""
    chat = Chat(model, offload, seed, *beside)
    chat.take(PROMPT)
    chat.steps_to_answer()
    return chat


def in_any_chunks(model: Any, kv_cache: str = "dense") -> Offload:
    """Attach with chunks that become shorter where there is less memory."""
    memory = device_memory(model, chunk_tokens=2048, kv_cache=kv_cache)
    return attached(model, device_memory=memory, chunk_tokens="auto", kv_cache=kv_cache)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_an_answer_has_residents_until_the_next_prompt(name: str, capture: bool) -> None:
    layers = {"num_hidden_layers": 3} if name == "gemma3" else {}  # some with a window
    model = long_model(name, **layers)
    with attached(model, capture=capture) as offload:
        chat = Chat(model, offload)
        chat.take(PROMPT)
        prompt = chat.plan
        assert prompt.resident_tokens == RESIDENT
        for take in (SHORT, LONG):
            chat.steps_to_answer()
            assert chat.plan.resident_tokens > prompt.resident_tokens
            assert chat.plan.activation_bytes < prompt.activation_bytes
            chat.check()
            chat.take(4, logits_to_keep=0)  # as where drafts are verified
            chat.steps(4)
            chat.check()
            assert chat.answers
            chat.take(take)
            chat.check()
            assert chat.answers == (take == SHORT)
            if chat.answers:
                chat.take(SHORT, logits_to_keep=0)  # whose logits no answer's plan has room for
                assert not chat.answers
        assert chat.plan == prompt
        chat.steps(3)
        chat.check()
        assert (offload.stats.captured_steps > 0) == capture


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("kv_cache", ["dense", "packed"])
def test_plans_change_once_as_many_bytes_were_streamed_in_vain_as_that_takes(kv_cache: str) -> None:
    model = long_model(num_hidden_layers=4).bfloat16()
    memory = device_memory(model, kv_cache=kv_cache)
    with attached(model, kv_cache=kv_cache, device_memory=memory) as offload:
        chat = Chat(model, offload)
        chat.take(PROMPT)
        prompt, tokens = chat.plan, []
        while not chat.answers:
            tokens.append(chat.cache.get_seq_length())
            chat.steps(1)
        answer = chat.plan

        def lost(steps: list[int]) -> int:
            plans = (prompt, answer)
            before, after = (sum(map(plan.streamed_bytes, steps)) for plan in plans)
            return before - after

        def cost(held: int) -> int:
            kept = (min(held, plan.resident_tokens) for plan in (prompt, answer))
            return sum(map(prompt.shape.host_kv_bytes, kept))

        *before, last = tokens
        assert len(before) > 1
        assert lost(before) >= cost(last)
        assert lost(before[:-1]) < cost(before[-1])
        chat.take(LONG)
        for _ in range(4):  # what was lost before a long call counts no more
            chat.steps(len(before) - 1)
            assert not chat.answers
            chat.take(LONG)


def test_an_answer_can_begin_at_once() -> None:
    model = long_model()
    with attached(model) as offload:
        chat = Chat(model, offload)
        chat.take(PROMPT)
        prompt = chat.plan
        chat.cache.state.begin_answer()
        assert chat.answers
        chat.steps(3)
        chat.check()
        answer = chat.plan
        chat.cache.state.begin_answer()  # has no effect a second time
        assert chat.plan is answer
        chat.take(LONG)
        assert chat.plan == prompt


def test_an_answer_does_not_begin_where_another_cache_may_need_the_memory() -> None:
    model = long_model()
    with in_any_chunks(model) as offload:
        chat = Chat(model, offload)
        chat.take(PROMPT)
        Chat(model, offload, 7, chat).take(PROMPT)
        chat.cache.state.begin_answer()
        assert not chat.answers
        chat.steps(2)
        chat.check()


def test_what_crosses_the_link_in_a_step_is_what_the_plan_says() -> None:
    model = long_model()
    with attached(model, capture=False) as offload:
        chat = answering(model, offload)
        chat.steps(2)
        plans = chat.plan.prompt_plan, chat.plan
        for plan in reversed(plans):
            assert plan is not None
            if chat.plan != plan:
                chat.take(LONG)
            chat.steps(1)
            before, tokens = offload.stats.bytes_to_device, chat.cache.get_seq_length()
            chat.steps(1)
            crossed = offload.stats.bytes_to_device - before
            tail = plan.shape.kv_bytes(2 * plan.page_tokens)
            assert 0 <= plan.streamed_bytes(tokens) - crossed <= tail or not crossed
            assert (crossed == 0) == (tokens <= plan.resident_tokens)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    "options",
    [{"resident_tokens": RESIDENT}, {"device_memory": None}, {"draft_tokens": 256}],
    ids=["given", "no-limit", "drafts"],
)
def test_what_the_user_set_stays(options: dict[str, Any]) -> None:
    model = long_model()
    with attached(model, **options) as offload:
        chat = Chat(model, offload)
        chat.take(PROMPT)
        before = chat.plan
        for _ in range(MANY):
            with torch.no_grad():
                model(random_tokens(1, 1), **chat.cache.as_keyword())
        assert chat.plan is before


def test_another_cache_has_the_memory_first() -> None:
    model = long_model()
    with in_any_chunks(model) as offload:
        first = answering(model, offload)
        second = Chat(model, offload, 7, first)
        second.take(PROMPT)
        assert not first.answers
        for _ in range(MANY):
            first.steps(1)
            second.steps(1)
        assert not first.answers
        assert not second.answers
        first.check()
        second.check()
        first.cache.park()
        second.cache.park()  # it is planned without the other when it goes on
        second.steps_to_answer()
        first.take(1)  # which needs an arena
        assert not second.answers
        second.steps(2)
        first.steps(2)
        first.check()
        second.check()


def forked(chat: Chat) -> OffloadedCache:
    return chat.cache.fork()


def copied(chat: Chat) -> OffloadedCache:
    return copy.deepcopy(chat.cache)


@pytest.mark.covering
@pytest.mark.parametrize("kv_cache", ["dense", "packed"])
@pytest.mark.parametrize("make", [forked, copied])
def test_copies_hold_the_same(make: Callable[[Chat], OffloadedCache], kv_cache: str) -> None:
    model = long_model() if kv_cache == "dense" else long_model().bfloat16()
    apart = APART[kv_cache]
    with in_any_chunks(model, kv_cache) as offload:
        chat = answering(model, offload)
        other = Chat(model, offload, 0, chat)
        other.cache, other.said, other._taken = make(chat), chat.said, chat._taken
        other.take(3)
        assert not chat.answers
        chat.take(2)
        chat.check(apart)
        other.check(apart)


def parked(chat: Chat, _folder: Path) -> None:
    chat.cache.park()


def cropped(chat: Chat, _folder: Path) -> None:
    chat.crop(PROMPT - 900)


def emptied(chat: Chat, _folder: Path) -> None:
    chat.cache.reset()
    chat.said = chat.said[:, :0]
    chat.take(SHORT)


def in_rows(chat: Chat, _folder: Path) -> None:
    chat.cache.batch_repeat_interleave(2)
    chat.cache.batch_select_indices(torch.tensor([1]))


def saved(chat: Chat, folder: Path) -> None:
    chat.cache.save(folder / "session")
    chat.cache.close()
    chat.cache = chat.offload.load_cache(folder / "session")


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("change", [parked, cropped, emptied, in_rows, saved])
def test_changes_of_an_answering_cache(
    change: Callable[[Chat, Path], None], tmp_path: Path
) -> None:
    model = long_model()
    with in_any_chunks(model) as offload:
        chat = answering(model, offload)
        change(chat, tmp_path)
        for take in (3, SHORT, LONG, 1, 1):
            chat.take(take)
            chat.check()


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    "options",
    [
        {"host_attention": 0.5},
        {"overlap": False},
        {"disk_cache": True, "host_memory": "2300KiB"},
    ],
    ids=["host", "in-turn", "disk"],
)
def test_placements(options: dict[str, Any], tmp_path: Path) -> None:
    model = long_model()
    if "disk_cache" in options:
        options = options | {"disk_cache": tmp_path}
    with attached(model, **options) as offload:
        chat = answering(model, offload)
        assert (chat.plan.disk_tokens(PROMPT) > 0) == ("disk_cache" in options)
        for take in (1, 5, SHORT, LONG, 1):
            chat.take(take)
            chat.check()
        assert not chat.answers


SLOW = replace(
    WITH_GPU.hardware,
    link_bytes_per_s=1e8,
    link_back_bytes_per_s=1e8,
    host_bytes_per_s=2e8,
    host_shared_bytes_per_s=2e8,
    host_attention_bytes_per_s=1e8,
)
"""A machine whose CPU and link take half of a step's bytes each."""


@pytest.mark.parametrize("capture", [True, False])
def test_a_cpu_that_an_answer_left_out_helps_again_after_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capture: bool
) -> None:
    # The CPU spares a step of a prompt's plan 28 ms, and one of an answer's 16. To ask it takes 21.
    monkeypatch.setattr(predict, "ASKED_LAYER_S", 10.5e-3)
    monkeypatch.setattr(route, "_STEADY_FROM", 0)
    monkeypatch.setattr(route, "STEADY_TOKENS", 48)
    caplog.set_level("INFO")
    monkeypatch.setattr(parts, "measured_hardware", lambda *_args: SLOW)
    model = long_model()
    with attached(model, host_attention="auto", capture=capture) as offload:
        chat, stats = Chat(model, offload), offload.stats
        chat.take(PROMPT)
        assert chat.plan.host_share > 0
        chat.steps_to_answer()
        assert chat.plan.host_share == 0
        attended_s = stats.host_attention_s
        assert attended_s > 0
        chat.steps(MANY)
        chat.check()
        assert stats.host_attention_s == attended_s
        # What both finish with is known, so that steps may be captured at once.
        settled = Settled(0.4, host_s=1e-3)
        offload.session.parts[0].shares.keep(
            ((1, torch.float32, Format.DENSE), 0), PROMPT + MANY, settled
        )
        with torch.no_grad():
            model(random_tokens(1, 9), use_cache=False)
        captures = stats.captures
        chat.steps(3)
        chat.check()
        assert not chat.answers
        assert stats.host_attention_s > attended_s
        assert (stats.captures > captures) is capture
    assert "other bits" not in caplog.text


def test_a_cpu_that_was_left_out_helps_once_there_are_more_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(predict, "ASKED_LAYER_S", 5e-3)
    monkeypatch.setattr(parts, "measured_hardware", lambda *_args: SLOW)
    model = long_model()
    with attached(model, host_attention="auto") as offload:
        chat = Chat(model, offload)
        chat.cache = offload.new_cache()  # how long it gets nobody knows
        chat.take(PROMPT)
        chat.steps_to_answer()
        assert chat.plan.host_share == 0
        while chat.said.shape[1] < 2 * PROMPT:
            chat.take(SHORT)
        chat.steps(MANY)
        assert chat.answers
        assert chat.plan.host_share > 0
        chat.check()


@pytest.mark.parametrize("kv_cache", ["dense", "packed"])
def test_an_answer_that_held_all_tokens_grows_beyond_its_plan(kv_cache: str) -> None:
    model, tokens = long_model(), PROMPT + 40
    model = model.bfloat16() if kv_cache == "packed" else model
    sizes = SIZES | {"resident_tokens": 0, "kv_cache": kv_cache}
    with headinfer.attach(model, **sizes) as offload:
        plan = offload.session.plan_for(1, tokens)
    short = activation_bytes(
        plan.shape, chunk_tokens=1024, tile_heads=plan.tile_heads, batch=1, device="simulated"
    )
    kept = resident_bytes(plan.shape, resident_tokens=tokens, batch=1)
    prompts = plan.total_device_bytes - plan.shape.weights_bytes + kept  # all would be resident
    device = SharedDevice(round((prompts - (plan.activation_bytes - short) / 2) / USED_SHARE))
    own = SIZES | {"kv_cache": kv_cache, "simulated_device": device}
    with headinfer.attach(model, **own) as offload:
        chat = Chat(model, offload)
        chat.cache = offload.new_cache(tokens)
        chat.take(PROMPT)
        prompt = chat.plan
        assert 0 < prompt.resident_tokens < tokens == prompt.context_tokens
        chat.cache.state.begin_answer()
        assert chat.plan.resident_tokens == tokens
        chat.steps(60)
        chat.check(APART[kv_cache])
        assert chat.plan.context_tokens > tokens
        assert chat.plan.device_memory_bytes == prompt.device_memory_bytes


class Full(SimulatedDevice):
    """A device whose memory others have taken: there is room for so many bytes in one piece."""

    most_bytes = 2**40
    refused = 0

    def device_empty(self, num_bytes: int) -> torch.Tensor:
        if num_bytes > self.most_bytes:
            self.refused += 1
            raise MemoryPlanError("the device has none left")
        return super().device_empty(num_bytes)


def test_a_device_without_the_memory_is_asked_once() -> None:
    model, device = long_model(), Full()
    with attached(model, simulated_device=device) as offload:
        chat = Chat(model, offload)
        chat.take(PROMPT)
        prompt, device.most_bytes = chat.plan, chat.plan.arena_bytes
        for _ in range(MANY):
            chat.steps(1)
            assert chat.plan is prompt
        assert device.refused == 1
        chat.check()
        chat.take(LONG)
        chat.check()


def test_a_device_that_lacks_even_what_it_gave_before_costs_the_residents_alone() -> None:
    model, device = long_model(), Full()
    with attached(model, simulated_device=device) as offload:
        chat = answering(model, offload)
        prompt = chat.plan.prompt_plan
        assert prompt is not None
        device.most_bytes = prompt.arena_bytes - 1
        chat.take(LONG)
        assert chat.plan.resident_tokens == 0
        chat.check()


def test_an_assistant_has_its_memory() -> None:
    model = long_model()
    with attached(model) as offload:
        chat = answering(model, offload)
        with offload.session.assistants.during(tiny_model("llama3"), 100):
            for _ in range(MANY):
                chat.steps(1)
                assert not chat.answers
        chat.steps_to_answer()


def test_a_call_without_our_cache_has_the_memory() -> None:
    model = long_model()
    with attached(model) as offload:
        chat = answering(model, offload)
        with torch.no_grad():
            model(random_tokens(1, 9), use_cache=False)
        assert not chat.answers
        chat.steps(1)
        chat.check()


def test_a_call_that_hands_out_more_than_logits_has_the_memory() -> None:
    model = long_model()
    with attached(model) as offload:
        chat = answering(model, offload)
        chat.take(2, output_hidden_states=True)
        assert not chat.answers
        chat.check()


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("layers", [(0, 0, 1), (0, 1, 0)])
def test_each_of_several_devices_has_a_plan_of_its_own(layers: tuple[int, ...]) -> None:
    model = long_model(num_hidden_layers=3)
    with attached(model, simulated_device=spread(*layers)) as offload:
        chat = Chat(model, offload)
        chat.take(PROMPT)
        chat.steps(MANY)
        assert all(part.prompt_plan is not None for part in chat.plan.parts)
        chat.check()
        for take in (SHORT, LONG, 1):
            chat.take(take)
            chat.check()
        assert not chat.answers


@pytest.mark.gpu
def test_cuda_answers_are_within_the_memory() -> None:
    model = long_model(num_key_value_heads=8, head_dim=128, num_hidden_layers=4).to("cuda")
    torch.cuda.empty_cache()
    others = torch.cuda.memory_reserved()
    with attached(model, device="cuda") as offload:
        chat = Chat(model, offload)
        chat.take(PROMPT)
        for take in (SHORT, LONG):
            chat.steps_to_answer()
            chat.steps(4)
            chat.check()
            chat.take(take)
            given = chat.plan.total_device_bytes - CUDA_OUTSIDE_BYTES - CUDA_GRAPHS_BYTES
            assert torch.cuda.memory_reserved() - others <= given
        assert not chat.answers
        chat.check()
