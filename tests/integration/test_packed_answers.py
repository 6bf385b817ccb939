"""Answers of caches whose tokens are packed in CPU memory, or rounded to 8 bits there."""

from typing import Any

import pytest
import torch

from answering_caches import LONG, PROMPT, SHORT, Chat, attached, device_memory, long_model
from packing_engines import at_home
from parted import spread

ROUNDING = {"packed": 2**-6, "int8": 0.05, "fp8": 0.2}
"""How far logits of bfloat16 may be from those of stock transformers."""


def chat_of(kv_cache: str, **options: Any) -> Chat:
    """Return a cache that has read a prompt."""
    model = long_model(num_hidden_layers=options.pop("layers", 4)).bfloat16()
    where = {name: options[name] for name in ("simulated_device",) if name in options}
    memory = device_memory(model, kv_cache=kv_cache, **where)
    offload = attached(model, kv_cache=kv_cache, device_memory=memory, **options)
    chat = Chat(model, offload)
    chat.take(PROMPT)
    return chat


def begin(chat: Chat) -> None:
    """Have a plan for the answer; what lies in CPU memory stays as it is."""
    for engine in chat.cache.state.engine.parts:
        before, prompt, held = at_home(engine), engine.plan, engine.held_tokens
        crossed = -chat.offload.stats.bytes_to_device
        with engine.in_use():
            assert engine.begin_answer(chat.cache.state._answers._room.plan(engine))
        assert engine.plan.prompt_plan is prompt
        kept = min(held, engine.plan.resident_tokens)
        crossed += chat.offload.stats.bytes_to_device
        assert crossed == prompt.shape.host_kv_bytes(kept)
        assert all(map(torch.equal, before, at_home(engine)))


WAYS: dict[str, dict[str, Any]] = {
    "streamed": {"capture": False},
    "captured": {},
    "with-host-attention": {"host_attention": 0.5},
    "in-turn": {"overlap": False, "capture": False},
    "several-devices": {"simulated_device": (0, 0, 0, 1, 1), "layers": 5},
}


_SLOW = ("streamed", "with-host-attention", "in-turn")


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("kv_cache", "way"),
    [
        *(
            pytest.param("packed", way, marks=pytest.mark.slow if way in _SLOW else ())
            for way in WAYS
        ),
        ("int8", "captured"),
        ("fp8", "with-host-attention"),
    ],
)
def test_an_answer_has_residents_until_the_next_prompt(kv_cache: str, way: str) -> None:
    options = dict(WAYS[way])
    if "simulated_device" in options:
        options["simulated_device"] = spread(*options["simulated_device"])
    chat = chat_of(kv_cache, **options)
    with chat.offload:
        prompt, apart = chat.plan, ROUNDING[kv_cache]
        for take in (LONG, SHORT):
            begin(chat)
            for before, after in zip(prompt.of_devices, chat.plan.of_devices, strict=True):
                assert before.resident_tokens < after.resident_tokens
                assert after.resident_tokens % 64 == 0
                assert after.raw_page_bytes == before.raw_page_bytes
            chat.steps(30)  # the prompt's last page is filled, and goes home
            chat.take(5)
            chat.check(apart)
            chat.take(take)
            chat.check(apart)
            assert chat.answers == (take == SHORT)
            if take == LONG:
                assert chat.plan == prompt
        chat.crop(PROMPT - 900)  # within residents
        chat.take(3)
        chat.check(apart)
