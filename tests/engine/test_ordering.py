"""The order of copies: seeds pass, and every wait that is left out is noticed."""

import copy
import functools
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import headinfer
from headinfer.device.base import Edge
from headinfer.device.hazards import HazardError
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.ready import Form
from headinfer.schedule import route
from host_share import engine_with_host_share
from tiny_models import random_tokens, tiny_model

SEEDS = 100


@pytest.fixture(autouse=True)
def _few_tokens_are_steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have steps that stream captured in one launch, with as few tokens as there are here."""
    monkeypatch.setattr(route, "STEADY_TOKENS", 24)
    monkeypatch.setattr(route, "_STEADY_FROM", 0)


in_pieces = functools.partial(SimulatedDevice, host_piece_bytes=2**11)
"""A device whose host memory is got in pieces, with tiles of each."""

STREAMING: dict[str, Any] = {
    "sparsity": 0.5,
    "head_pattern": "random",
    "sink_tokens": 3,
    "recent_tokens": 7,
}


@functools.cache
def small_model(layers: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny_model(
        "llama3", num_hidden_layers=layers, num_key_value_heads=2, num_attention_heads=2
    )
    return model.to(dtype)


def exercise(
    *devices: SimulatedDevice,
    overlap: bool = True,
    streaming: bool = False,
    capture: bool = True,
    drafting: bool = False,
    packed: bool = False,
) -> torch.Tensor:
    """Go through all that moves KV: chunks, decoding past a page, crop, beams, a copied cache.

    Some tokens are resident, and some attended by the host. With `streaming` half of the heads see
    sinks and a window alone. With several devices there is one for each layer. With `drafting`
    there are drafts, too. With `packed` tokens are packed in host memory.
    """
    model = small_model(max(len(devices), 3), torch.bfloat16 if packed else torch.float32)
    prompt = random_tokens(2, 31)
    with headinfer.attach(
        model,
        device="simulated",
        simulated_device=devices if devices[1:] else devices[0],
        tile_heads=1,
        tile_tokens=16,
        chunk_tokens=12,
        overlap=overlap,
        capture=capture,
        resident_tokens=9,
        host_attention=0.4,
        draft_tokens=13,
        kv_cache="packed" if packed else "dense",
        **(STREAMING if streaming else {}),
    ) as offload:
        cache = offload.new_cache()
        outputs = [model(prompt, past_key_values=cache, logits_to_keep=1).logits]
        for step in range(13):  # pages of 6 tokens fill twice
            token = prompt[:, step : step + 1]
            outputs.append(model(token, past_key_values=cache).logits)
        captured = [form for _, form in cache.state.engine.captured]
        assert captured == [Form.STREAMED if overlap else Form.IN_PIECES] * capture
        cache.reorder_cache(torch.tensor([1, 0]))
        outputs.append(model(prompt[:, :3], past_key_values=cache).logits)
        copied = copy.deepcopy(cache)  # which shares the host's tokens from now on
        outputs.append(model(prompt[:, :8], past_key_values=copied).logits)
        copied.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-13)
        outputs.append(model(prompt[:, :14], past_key_values=cache).logits)
        cache.batch_select_indices(torch.tensor([1]))
        outputs.append(model(prompt[:1, :9], past_key_values=cache).logits)
        if drafting:
            outputs += drafts(model, cache, prompt[:1])
        cache.close()
        outputs.append(model(prompt[:, :2], past_key_values=copied).logits)
    del cache, copied
    for device in devices:
        device.memory.check()
    return torch.cat([output[:1].flatten() for output in outputs])


def drafts(model: PreTrainedModel, cache: Any, prompt: torch.Tensor) -> list[torch.Tensor]:
    """Return what drafts give, whose copies come from the page, from the host, and both."""
    outputs = [model(prompt[:, :2], past_key_values=cache).logits]
    with cache.drafting():
        pass
    cache.crop(-5)  # copies over the link then overwrite some that compute has made
    for tokens in (3, 4):
        with cache.drafting():
            outputs += [model(prompt[:, :1], past_key_values=cache).logits for _ in range(5)]
        outputs.append(model(prompt[:, :tokens], past_key_values=cache).logits)
    return outputs


@pytest.mark.parametrize(
    ("streaming", "seeds"),
    [(False, SEEDS // 12), (True, SEEDS // 12), pytest.param(False, SEEDS, marks=pytest.mark.slow)],
    ids=["all", "half", "all-of-them"],
)
def test_all_seeds_give_the_same_result(streaming: bool, seeds: int) -> None:
    wanted = exercise(in_pieces(seed=0), overlap=False, streaming=streaming)
    assert wanted.isfinite().all()
    for seed in range(seeds):
        ours = exercise(in_pieces(seed=seed), streaming=streaming)
        torch.testing.assert_close(ours, wanted)


@pytest.mark.slow
def test_all_seeds_give_the_same_result_from_packed_tokens() -> None:
    wanted = exercise(in_pieces(seed=0), overlap=False, drafting=True, packed=True)
    assert wanted.isfinite().all()
    for seed in range(1, SEEDS // 4):
        assert torch.equal(exercise(in_pieces(seed=seed), drafting=True, packed=True), wanted)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("streaming", [False, True], ids=["all", "half"])
def test_all_seeds_give_the_same_drafts(streaming: bool) -> None:
    wanted = exercise(in_pieces(seed=0), overlap=False, streaming=streaming, drafting=True)
    assert wanted.isfinite().all()
    for seed in (1, 2):
        ours = exercise(in_pieces(seed=seed), streaming=streaming, drafting=True)
        torch.testing.assert_close(ours, wanted)


OF_DRAFTS = {Edge.DRAFT_FREE, Edge.DRAFT_FILLED}
"""Waits of drafts."""

OF_PACKING = {Edge.PAGES_SENT, Edge.PAGES_READ}
"""Waits of tokens that are packed, which others make up for in a model of several layers.

`test_packed_tokens.py` leaves them out.
"""

OF_DISK = {Edge.BLOCK_SENT, Edge.BLOCK_READ, Edge.READ_COPIED}
"""Waits of blocks that go to the disk, and come from there; `test_disk_tokens.py` leaves them out.
"""

BETWEEN_DEVICES = {Edge.STEP_JOINED: 0, Edge.STEP_FORKED: 1}
"""Waits of one device's compute for another's, and the device that waits."""

ELSEWHERE = OF_PACKING | OF_DISK
WITHIN_ONE = sorted(set(Edge) - BETWEEN_DEVICES.keys() - ELSEWHERE, key=lambda edge: edge.name)
"""All other waits."""


def test_every_kind_of_wait_is_exercised() -> None:
    device = in_pieces(seed=1)
    exercise(device, drafting=True)
    assert device.exercised_edges == set(WITHIN_ONE)


@pytest.mark.parametrize("edge", WITHIN_ONE)
def test_a_missing_wait_is_noticed(edge: Edge) -> None:
    with pytest.raises(HazardError, match="is not ordered after the"):
        exercise(in_pieces(seed=1, skip=[edge]), drafting=edge in OF_DRAFTS)


@pytest.mark.parametrize(
    "edge",
    [
        *(Edge.HOST_WRITTEN, Edge.PAGE_FREE, Edge.PAGE_WRITTEN, Edge.TILE_FILLED, Edge.TILE_FREE),
        *(Edge.STEP_READY, Edge.STEP_DONE, Edge.SERVED, Edge.TOKENS_SENT, Edge.ANSWERED),
    ],
)
def test_a_missing_wait_of_packed_tokens_is_noticed(edge: Edge) -> None:
    with pytest.raises(HazardError, match="is not ordered after the"):
        exercise(in_pieces(seed=1, skip=[edge]), packed=True)


def send_late(device: SimulatedDevice) -> torch.Tensor:
    """Pass prompts that are resident, and are sent home behind the last layer; return logits."""
    model, prompt = small_model(3), random_tokens(1, 12)
    with headinfer.attach(
        model,
        device="simulated",
        simulated_device=device,
        chunk_tokens=12,
        resident_tokens=40,
    ) as offload:
        cache = offload.new_cache()
        model(prompt, past_key_values=cache, logits_to_keep=1)
        cache.crop(-5)  # compute overwrites what is sent
        model(prompt, past_key_values=cache, logits_to_keep=1)
        copied = copy.deepcopy(cache)  # its residents come from the host
        logits: torch.Tensor = model(prompt, past_key_values=copied).logits
        del cache, copied
    device.memory.check()
    return logits


def test_all_seeds_give_the_same_result_behind_the_last_layer() -> None:
    wanted = send_late(in_pieces(seed=0))
    assert wanted.isfinite().all()
    for seed in range(1, SEEDS // 32):
        assert torch.equal(send_late(in_pieces(seed=seed)), wanted)


@pytest.mark.parametrize("edge", [Edge.PAGE_WRITTEN, Edge.HOST_SETTLED])
def test_a_missing_wait_behind_the_last_layer_is_noticed(edge: Edge) -> None:
    with pytest.raises(HazardError, match="is not ordered after the"):
        send_late(in_pieces(seed=1, skip=[edge]))


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [True, False])
def test_layers_on_several_devices_give_the_same_result(overlap: bool) -> None:
    whole = SimulatedDevice(seed=0)
    wanted = exercise(*[whole] * 4, overlap=False)
    for seed in range(SEEDS // 16):
        devices = [SimulatedDevice(seed=seed), SimulatedDevice(seed=seed + 1)]
        first, second = devices
        ours = exercise(first, second, second, first, overlap=overlap)
        torch.testing.assert_close(ours, wanted)
        for at, device in enumerate(devices):
            others = {edge for edge, waiting in BETWEEN_DEVICES.items() if waiting != at}
            if overlap:
                assert device.exercised_edges == set(Edge) - others - OF_DRAFTS - ELSEWHERE
            else:
                assert device.exercised_edges.isdisjoint(others)


OF_CAPTURES = {Edge.STEP_READY, Edge.STEP_DONE, Edge.SERVED}
"""Waits of captured steps on a device."""

IN_OTHERS = {Edge.PAGE_FREE}
"""Waits that those of captured steps make up for, in a model of few layers."""

ON_EACH = [
    (edge, at, capture)
    for edge in WITHIN_ONE
    for at in (0, 1)
    for capture in (False, True)
    if edge not in (IN_OTHERS if capture else OF_CAPTURES)
]


@pytest.mark.covering("edge", "at", "options")
@pytest.mark.parametrize(
    ("edge", "at", "options"),
    [
        *((edge, at, {"capture": capture}) for edge, at, capture in ON_EACH),
        *((*each, {"overlap": True}) for each in BETWEEN_DEVICES.items()),
        *((*each, {"overlap": False}) for each in BETWEEN_DEVICES.items()),
    ],
)
def test_a_missing_wait_on_any_device_is_noticed(
    edge: Edge, at: int, options: dict[str, bool]
) -> None:
    skipped = [[], []]
    skipped[at].append(edge)
    first, second = (SimulatedDevice(seed=1, skip=skip) for skip in skipped)
    with pytest.raises(HazardError, match="is not ordered after the"):
        exercise(first, second, second, first, **options, drafting=edge in OF_DRAFTS)


def test_an_arena_freed_with_a_copy_in_flight_is_noticed() -> None:
    device = in_pieces(skip=[Edge.HOST_SETTLED])
    engine = engine_with_host_share(device)
    with pytest.raises(HazardError):
        engine.replan(engine.plan)
    with pytest.raises(HazardError, match=r"compute has this memory for next .* on copy-out"):
        device.memory.check()
