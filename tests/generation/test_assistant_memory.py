"""An assistant's memory is in the plans of the model that it drafts for."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import headinfer
from headinfer.errors import MemoryPlanError
from headinfer.integration.calls import last_logits
from headinfer.session import Session
from saved_models import make_tokenizer
from tiny_models import VOCAB, random_tokens, tiny_model

TOKENS = 1001
MEMORY = {"device": "simulated", "device_memory": "32MiB"}
ONE_CHUNK = 4096
"""Chunks of one size: what an assistant leaves could go to larger ones instead."""


def weights_bytes(model: torch.nn.Module) -> int:
    return sum(each.nbytes for each in (*model.parameters(), *model.buffers()))


def kv_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def plan_with(assistant: Any, tokens: int = TOKENS, **options: Any) -> Any:
    with (
        headinfer.attach(tiny_model("llama3"), **MEMORY | options) as offload,
        offload.session.assistants.during(assistant, tokens),
    ):
        return offload.session.plan_for(1, tokens)


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_an_assistant_takes_of_the_memory_that_was_given(name: str) -> None:
    assistant = tiny_model(name)
    most = plan_with(None, chunk_tokens=ONE_CHUNK)
    taken = plan_with(assistant, chunk_tokens=ONE_CHUNK).assistant
    assert most.resident_tokens == TOKENS
    given = most.total_device_bytes + taken.total_bytes - most.resident_bytes // 2
    options = {"device_memory": f"{given}B", "chunk_tokens": ONE_CHUNK}
    alone, beside = (plan_with(each, **options) for each in (None, assistant))
    assert beside.assistant == taken
    assert beside.assistant.weights_bytes == weights_bytes(assistant)
    cache = DynamicCache(config=assistant.config)
    for part in random_tokens(1, TOKENS).split(512, dim=1):
        last_logits(assistant, part, cache)
    assert beside.assistant.working_bytes > kv_bytes(cache)
    assert beside.total_device_bytes <= beside.device_memory_bytes == given
    assert 0 < beside.resident_tokens < alone.resident_tokens
    assert f"an assistant {beside.assistant.total_bytes / 2**20:.2f} MiB" in str(beside)
    assert "assistant" not in str(alone)


def test_an_assistant_that_leaves_no_room_is_refused_with_what_it_takes() -> None:
    assistant = tiny_model("llama3")
    with pytest.raises(MemoryPlanError, match=r"takes \d+\.\d+ GiB, .* the 32.00 MiB of device"):
        plan_with(assistant, 100_001)
    taken = plan_with(assistant).assistant.total_bytes
    with pytest.raises(MemoryPlanError, match=r"; an assistant takes \d+\.\d+ MiB beside that"):
        plan_with(assistant, device_memory=f"{taken + 1000}B")


def test_answers_with_the_same_assistant_count_its_weights_once() -> None:
    assistant = tiny_model("llama3")
    with headinfer.attach(tiny_model("llama3"), **MEMORY) as offload:
        assistants = offload.session.assistants
        with assistants.during(assistant, 100):
            one = offload.session.plan_for(1, 100).assistant
            with assistants.during(assistant, 100):
                two = offload.session.plan_for(1, 100).assistant
            assert offload.session.plan_for(1, 100).assistant == one
        assert offload.session.plan_for(1, 100).assistant.total_bytes == 0
    assert two.weights_bytes == one.weights_bytes
    assert two.working_bytes == 2 * one.working_bytes


def test_an_attached_assistant_counts_with_its_own_plan() -> None:
    assistant = tiny_model("llama3")
    small = {"chunk_tokens": 128, "tile_heads": 1, "tile_tokens": 64}
    with headinfer.attach(assistant, device="simulated", **small) as offload:
        plan = offload.plan
        taken = plan_with(assistant).assistant
    assert taken.working_bytes == plan.kv_device_bytes + plan.activation_bytes


def test_an_answers_plan_and_times_have_the_assistant(monkeypatch: pytest.MonkeyPatch) -> None:
    model, assistant = tiny_model("llama3"), tiny_model("llama3")
    plans = []
    resolve = Session.plan_for

    def noted(*args: Any, **keywords: Any) -> Any:
        plans.append(resolve(*args, **keywords))
        return plans[-1]

    monkeypatch.setattr(Session, "plan_for", noted)
    settings = {"tokenizer": make_tokenizer(VOCAB), "max_new_tokens": 6, **MEMORY}
    ids = random_tokens(1, 300)[0].tolist()
    *_, last = headinfer.generate(model, ids, assistant=assistant, draft=2, **settings)
    assert {plan.assistant.weights_bytes for plan in plans} == {weights_bytes(assistant)}
    assert last.draft_read_s > 0
    plans.clear()
    *_, last = headinfer.generate(model, ids, prompt_lookup_num_tokens=2, **settings)
    assert {plan.assistant.total_bytes for plan in plans} == {0}
    assert last.draft_read_s == 0


def test_an_assistant_that_cannot_draft_has_no_cache_in_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its weights are there all the same."""
    model, assistant, plans = tiny_model("qwen3-next"), tiny_model("llama3"), []
    resolve = Session.plan_for

    def noted(*args: Any, **keywords: Any) -> Any:
        plans.append(resolve(*args, **keywords))
        return plans[-1]

    monkeypatch.setattr(Session, "plan_for", noted)
    settings = {"tokenizer": make_tokenizer(VOCAB), "max_new_tokens": 2, **MEMORY}
    ids = random_tokens(1, 30)[0].tolist()
    *_, last = headinfer.generate(model, ids, assistant=assistant, draft=2, **settings)
    assert last.drafted_tokens == 0
    assert {plan.assistant.weights_bytes for plan in plans} == {weights_bytes(assistant)}
    assert {plan.assistant.working_bytes for plan in plans} == {0}
