"""Heads that see sinks and a window alone: each layer's attention by its definition."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attended import native, reference
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.table import Kernels
from headinfer.attend.work import Work
from headinfer.device.base import Device
from headinfer.device.cpu import CpuDevice
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.errors import CacheStateError
from headinfer.plan.memory import SPARE_TOKENS, resident_bytes
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.resolve import resolve
from headinfer.plan.shape import LayerShape, StreamingHeads
from headinfer.schedule.route import Pass
from shapes import model_shape

HEADS, GROUP, DIM, SCALE = 4, 2, 8, 0.3


def planned(
    device: str,
    streaming: list[StreamingHeads],
    *,
    resident: int = 0,
    host_share: float = 0.0,
    tile: tuple[int, int] = (1, 16),
    chunk_tokens: int = 12,
) -> Plan:
    shape = model_shape(layers=len(streaming), kv_heads=HEADS, group=GROUP, itemsize=8)
    layers = [
        dataclasses.replace(layer, streaming=heads if heads.heads else None)
        for layer, heads in zip(shape.layers, streaming, strict=True)
    ]
    shape = dataclasses.replace(shape, layers=tuple(layers))
    heads, tokens = min(tile[0], max(shape.kv_heads, 1)), tile[1]
    options = Options.parse(tile_heads=heads, tile_tokens=tokens, chunk_tokens=chunk_tokens)
    plan = resolve(shape, options, device=device)
    if device == "cpu" or not shape.full_layers:
        return plan
    size = resident_bytes(shape, resident_tokens=resident, batch=1)
    return dataclasses.replace(
        plan, resident_tokens=resident, resident_bytes=size, host_share=host_share
    )


class Chat:
    """An engine, and the same tokens as plain tensors."""

    def __init__(self, plan: Plan, seed: int = 0, kernels: Kernels | None = None) -> None:
        device: Device = CpuDevice() if plan.device == "cpu" else SimulatedDevice(seed=seed)
        self.kernels = kernels or reference()
        self.engine = Engine(device, plan, torch.float64, Stats())
        self.layers = plan.shape.layers
        self.generator = torch.Generator().manual_seed(seed)
        self.kv = [self.draw(2, 1, HEADS, 0, DIM) for _ in self.layers]

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def step(self, tokens: int, *, kind: Pass = Pass.FORWARD) -> None:
        """Pass tokens through all layers, and compare each with its definition."""
        host = self.kernels if self.engine.plan.host_share else None
        for at, layer in enumerate(self.layers):
            new = self.draw(2, 1, HEADS, tokens, DIM)
            self.kv[at] = torch.cat((self.kv[at], new), dim=3)
            if kind is Pass.APPEND:
                self.engine.append(at, *new)
                continue
            query = self.draw(1, HEADS, GROUP, tokens, DIM)
            ours = self.engine.attend(
                *(at, query.flatten(1, 2), *new),
                **{"kernels": self.kernels, "scale": SCALE, "host_kernels": host},
            )
            wanted = by_definition(query, *self.kv[at], layer)
            torch.testing.assert_close(ours, wanted.flatten(2, 3))

    def crop(self, tokens: int) -> None:
        for at in range(len(self.layers)):
            self.engine.crop(at, tokens)
            self.kv[at] = self.kv[at][:, :, :, :-tokens]


def by_definition(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: LayerShape
) -> torch.Tensor:
    """Return the attention of the newest tokens, each head's with its own mask."""
    q_len, kv_len = query.shape[3], keys.shape[2]
    own = torch.arange(kv_len - q_len, kv_len)[:, None]
    columns = torch.arange(kv_len)[None]
    seen = (columns <= own).repeat(HEADS, 1, 1)
    if layer.streaming is not None:
        near = (columns < layer.streaming.sink_tokens) | (
            columns > own - layer.streaming.recent_tokens
        )
        for head in layer.streaming.heads:
            seen[head] &= near
    scores = query @ keys.unsqueeze(2).transpose(-1, -2) * SCALE
    weights = scores.masked_fill(~seen[None, :, None], -torch.inf).softmax(-1)
    return (weights @ values.unsqueeze(2)).permute(0, 3, 1, 2, 4)


def some(*heads: int, sinks: int = 3, recent: int = 7) -> StreamingHeads:
    return StreamingHeads(heads=heads, sink_tokens=sinks, recent_tokens=recent)


DEVICES = pytest.mark.parametrize("device", ["cpu", "simulated"])


@st.composite
def patterns(draw: st.DrawFn) -> list[StreamingHeads]:
    """Draw which heads of a few layers stream; all have the same reach."""
    sinks, recent = draw(st.integers(0, 20)), draw(st.integers(1, 40))
    chosen = draw(st.lists(st.sets(st.integers(0, HEADS - 1)), min_size=1, max_size=3))
    return [some(*sorted(heads), sinks=sinks, recent=recent) for heads in chosen]


@pytest.mark.covering(most=1)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
@DEVICES
def test_every_pattern_reach_chunk_and_tile_is_attended_as_defined(
    device: str, data: st.DataObject
) -> None:
    plan = planned(
        device,
        data.draw(patterns(), "streaming"),
        resident=data.draw(st.sampled_from([0, 9, 200]), "resident"),
        host_share=data.draw(st.sampled_from([0.0, 0.4]), "host share"),
        tile=data.draw(st.sampled_from([(1, 16), (2, 9), (4, 64)]), "tile"),
        chunk_tokens=data.draw(st.sampled_from([5, 12, 64]), "chunk"),
    )
    chat = Chat(plan, data.draw(st.integers(0, 2**16), "seed"))
    for tokens in data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=8), "calls"):
        chat.step(tokens)
        if data.draw(st.booleans(), "crop"):
            chat.crop(data.draw(st.integers(1, min(tokens, SPARE_TOKENS)), "cropped"))
    chat.engine.close()


@pytest.mark.covering(most=1)
@DEVICES
def test_decode_steps_go_on_when_the_window_begins_anew(device: str) -> None:
    chat = Chat(planned(device, [some(0, 3), some(), some(0, 1, 2, 3)]))
    chat.step(2)
    for _ in range(40):  # behind each other in the window, as single tokens are
        chat.step(5)
    for _ in range(SPARE_TOKENS - 50):
        chat.step(1)
    chat.crop(SPARE_TOKENS)
    chat.step(3)
    chat.step(1)


@DEVICES
def test_native_kernels_attend_the_sinks_too(device: str) -> None:
    chat = Chat(planned(device, [some(1, 2, sinks=20, recent=33)]), kernels=native())
    for tokens in [50, 1, 1, 7, 90, 1]:
        chat.step(tokens)


@DEVICES
def test_tokens_that_are_not_attended_are_kept_as_others_are(device: str) -> None:
    chat = Chat(planned(device, [some(1, 2), some(0)]))
    chat.step(30, kind=Pass.APPEND)
    chat.step(1)
    chat.step(30, kind=Pass.APPEND)
    chat.step(9)


@pytest.mark.slow
def test_what_no_query_sees_is_neither_kept_nor_sent() -> None:
    stats, kept = [], []
    for heads in [(), (0, 2)]:
        chat = Chat(planned("simulated", [some(*heads)] * 2))
        chat.step(400)
        for _ in range(30):
            chat.step(1)
        stats.append(chat.engine._stats)
        kept.append(chat.engine.host_kv_bytes)
        window = 3 + 7 - 1 + SPARE_TOKENS + chat.engine.plan.page_tokens
        token_bytes = 2 * 2 * DIM * 8  # of two heads' keys and values
        assert chat.engine.window_bytes == (2 * window * token_bytes if heads else 0)
        assert chat.engine.device_kv_bytes <= chat.engine.plan.kv_device_bytes
    assert 2 * kept[1] == kept[0]
    # Some tiles are fetched ahead in vain, when what they were cut from changes.
    half = pytest.approx(stats[0].bytes_to_device / 2, rel=0.02)
    assert stats[1].bytes_to_device == half
    assert 2 * stats[1].bytes_to_host == stats[0].bytes_to_host


def test_what_streaming_heads_dropped_cannot_be_taken_back() -> None:
    chat = Chat(planned("cpu", [some(1)]))
    chat.step(600)
    with pytest.raises(CacheStateError, match="streaming heads with a window of 7 tokens"):
        chat.crop(400)
    chat.step(2)
    chat.crop(600)  # all but some sinks, which are kept
    chat.step(5)


@DEVICES
def test_rows_are_rearranged_and_copied(device: str) -> None:
    plan = planned(device, [some(0, 3), some(1)])
    options = Options.parse(tile_heads=1, tile_tokens=16, chunk_tokens=12)
    plan = resolve(plan.shape, options, device=device, batch=2)
    where: Device = CpuDevice() if device == "cpu" else SimulatedDevice()
    engine = Engine(where, plan, torch.float64, Stats())
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    kv = [draw(2, 2, HEADS, 0, DIM) for _ in plan.shape.layers]

    def step(engine: Engine, tokens: int) -> None:
        for at, layer in enumerate(plan.shape.layers):
            new, query = draw(2, 2, HEADS, tokens, DIM), draw(2, HEADS, GROUP, tokens, DIM)
            kv[at] = torch.cat((kv[at], new), dim=3)
            ours = engine.attend(at, query.flatten(1, 2), *new, kernels=reference(), scale=SCALE)
            torch.testing.assert_close(ours, by_definition(query, *kv[at], layer).flatten(2, 3))

    step(engine, 40)
    step(engine, 1)
    for at in range(len(plan.shape.layers)):
        engine.select(at, [1, 1])
        kv[at] = kv[at][:, [1, 1]]
    step(engine, 1)
    copied = Engine(where, plan, torch.float64, Stats())
    copied.copy_from(engine)
    engine.close()
    step(copied, 1)
    step(copied, 30)


def test_a_call_that_ends_between_the_tracks_leaves_a_cache_to_reset() -> None:
    class Failing(ReferenceKernel):
        """Fails at the heads that stream."""

        def attend(self, work: Work) -> None:
            if work.query.shape[1] == 3:
                raise KeyboardInterrupt
            super().attend(work)

    chat = Chat(planned("simulated", [some(1, 2, 3)] * 2))
    chat.step(20)
    new, query = chat.draw(2, 1, HEADS, 1, DIM), chat.draw(1, HEADS, GROUP, 1, DIM)
    with pytest.raises(KeyboardInterrupt):
        chat.engine.attend(1, query.flatten(1, 2), *new, kernels=Kernels([Failing()]), scale=SCALE)
    for refused in (chat.engine.lengths, lambda: chat.engine.crop(1, 1)):
        with pytest.raises(CacheStateError, match="was interrupted"):
            refused()
    chat.engine.clear()
    chat.kv = [kv[:, :, :, :0] for kv in chat.kv]
    chat.step(20)


def test_keys_of_heads_that_hold_other_tokens_are_not_read() -> None:
    chat = Chat(planned("cpu", [some(1), some()]))
    chat.step(20)
    with pytest.raises(CacheStateError, match="layer 0 has streaming heads"):
        chat.engine.read(0, "keys")
    assert chat.engine.read(1, "keys").shape == (1, HEADS, 20, DIM)
