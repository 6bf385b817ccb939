"""Residents go home behind the last layer: those of all layers at once, also after a failure."""

import pytest

import headinfer
from conversation import DIM, Conversation, planned
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.table import Kernels
from headinfer.attend.work import Work
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.stats import Stats
from headinfer.integration.calls import cache_argument
from tiny_models import random_tokens, tiny_model

LAYERS, CHUNK_TOKENS = 3, 12
TOKEN_BYTES = 2 * 2 * DIM * 8  # keys and values of two heads, in float64


class Watching(ReferenceKernel):
    """A kernel that notes what was sent home before each work, and fails at one of them."""

    def __init__(self, stats: Stats, failing: int = 0) -> None:
        super().__init__()
        self.stats, self.failing = stats, failing
        self.sent: list[int] = []

    def attend(self, work: Work) -> None:
        self.sent.append(self.stats.bytes_to_host)
        if len(self.sent) == self.failing:
            raise MemoryError("no more")
        super().attend(work)


@pytest.mark.parametrize("resident", [100, CHUNK_TOKENS])
def test_nothing_is_sent_before_the_last_layer_is_attended(resident: int) -> None:
    stats = Stats()
    kernel = Watching(stats)
    chat = Conversation(planned("simulated", LAYERS, resident, 0.0), 0, Kernels([kernel]), stats)
    chat.step(CHUNK_TOKENS)
    assert set(kernel.sent) == {0}
    assert stats.bytes_to_host == LAYERS * CHUNK_TOKENS * TOKEN_BYTES
    chat.engine.give_up_residents()  # from now on all come from the host
    assert stats.bytes_to_host == LAYERS * CHUNK_TOKENS * TOKEN_BYTES
    chat.step(2)
    chat.engine.close()


@pytest.mark.parametrize("failing", range(1, LAYERS + 1))
@pytest.mark.parametrize("tokens", [1, 5, CHUNK_TOKENS, 2 * CHUNK_TOKENS + 1])
def test_what_a_failed_pass_left_is_sent_by_the_next(failing: int, tokens: int) -> None:
    stats = Stats()
    kernel = Watching(stats)
    chat = Conversation(planned("simulated", LAYERS, 60, 0.0), 1, Kernels([kernel]), stats)
    chat.step(1)
    before, kv = 1, list(chat.kv)
    kernel.failing = len(kernel.sent) + failing
    with pytest.raises(MemoryError):
        chat.step(CHUNK_TOKENS)
    for layer in range(LAYERS):
        chat.engine.crop(layer, chat.engine.tokens(layer) - before)
    chat.kv, kernel.failing = kv, 0
    chat.step(tokens)
    chat.step(CHUNK_TOKENS)
    chat.engine.give_up_residents()
    chat.step(2)
    chat.engine.close()


@pytest.mark.parametrize("kv_cache", ["dense", "packed"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_chunk_is_sent_behind_all_of_its_kernels_unless_it_is_packed(
    kv_cache: str, devices: int
) -> None:
    model = tiny_model("llama3", num_hidden_layers=4).bfloat16()
    simulated = [SimulatedDevice(seed=at) for at in range(devices)]
    sent: list[int] = []
    with headinfer.attach(
        model,
        device="simulated",
        simulated_device=[simulated[layer * devices // 4] for layer in range(4)],
        kv_cache=kv_cache,
        resident_tokens=400,
        chunk_tokens=128,
    ) as offload:
        cache = offload.new_cache()
        watched = [*model.model.layers, model.lm_head]
        hooks = [
            each.register_forward_hook(lambda *_: sent.append(offload.stats.bytes_to_host))
            for each in watched
        ]
        model(random_tokens(1, 256), logits_to_keep=1, **cache_argument(model, cache))
        for hook in hooks:
            hook.remove()
        assert not cache.state.engine.sends_late
        left = offload.stats.bytes_to_host
        model(random_tokens(1, 1), **cache_argument(model, cache))
        whole = offload.stats.bytes_to_host
    first, second = sent[:4], sent[-5:]
    if kv_cache == "dense":
        assert first == [0] * 4
        assert second == [whole // 2] * 5
        assert left == whole // 2  # the last chunk's go when the next call begins
    else:
        assert first == [first[0] * number for number in (1, 2, 3, 4)]
        assert second[-1] == left == whole
    assert whole > 0


def test_ctrl_c_while_memory_is_waited_for_leaves_nothing_half_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stats = Stats()
    chat = Conversation(
        planned("simulated", LAYERS, 60, 0.0), 1, Kernels([ReferenceKernel()]), stats
    )
    last = chat.engine._full[-1]

    def stopped(_tokens: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "reserve", stopped)
    kv = list(chat.kv)
    with pytest.raises(KeyboardInterrupt):
        chat.step(CHUNK_TOKENS)
    monkeypatch.undo()
    assert not chat.engine.interrupted
    assert chat.engine.lengths() == [CHUNK_TOKENS] * LAYERS
    for layer in range(LAYERS):
        chat.engine.crop(layer, CHUNK_TOKENS)
    chat.kv = kv
    chat.step(CHUNK_TOKENS)
    chat.step(2)
    chat.engine.close()
