"""The engine against plain tensors, over any shapes, tiles and changes of the cache."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from attended import attended, only, reference
from headinfer.attend.masks import Padding
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.select import select_kernels
from headinfer.device.base import Device
from headinfer.device.cpu import CpuDevice
from headinfer.device.simulated import SimulatedDevice
from headinfer.engine.engine import Engine
from headinfer.engine.stats import Stats
from headinfer.errors import CacheStateError, MemoryPlanError
from headinfer.plan.memory import resident_bytes
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.resolve import resolve
from shapes import model_shape


@dataclass
class Plain:
    """The cache as two plain tensors a layer, and attention by its definition."""

    windows: list[int]
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        self.keys[layer_idx] = torch.cat((self.keys[layer_idx], keys), dim=2)
        self.values[layer_idx] = torch.cat((self.values[layer_idx], values), dim=2)
        all_keys, all_values = self.keys[layer_idx], self.values[layer_idx]
        scores = query @ all_keys.unsqueeze(2).transpose(-1, -2) * 0.3
        q_len, kv_len = scores.shape[-2:]
        hidden = torch.ones(q_len, kv_len).triu(kv_len - q_len + 1).bool().expand(scores.shape)
        if self.windows[layer_idx]:
            beyond = kv_len - q_len - self.windows[layer_idx]
            hidden = hidden | torch.ones(q_len, kv_len).tril(beyond).bool()
        if valid is not None:
            hidden = hidden | ~valid[:, None, None, None, :kv_len]
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            column = sinks[None, :, :, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, column), dim=-1)
        weights = scores.softmax(dim=-1)[..., :kv_len].nan_to_num(0.0)
        return (weights @ all_values.unsqueeze(2)).permute(0, 3, 1, 2, 4)


def padding_seen(valid: torch.Tensor | None, new: int, window_tokens: int) -> Padding | None:
    """Return the padding of the tokens that a layer's mask tells of."""
    if valid is None:
        return None
    if window_tokens:
        valid = valid[:, max(valid.shape[1] - new - window_tokens + 1, 0) :]
    return Padding.of(valid)


def make_device(name: str, seed: int) -> Device:
    return CpuDevice() if name == "cpu" else SimulatedDevice(seed=seed)


changes = st.lists(
    st.one_of(
        st.tuples(st.just("attend"), st.integers(1, 40)),
        st.tuples(st.just("append"), st.integers(1, 90)),
        st.tuples(st.just("decode"), st.integers(1, 12)),
        st.tuples(st.just("crop"), st.integers(1, 36)),
        st.tuples(st.just("reorder"), st.integers(0, 8)),
        st.tuples(st.just("resize"), st.integers(1, 3)),
        st.tuples(st.just("clear"), st.just(0)),
        st.tuples(st.just("replan"), st.integers(0, 60)),
    ),
    min_size=1,
    max_size=7,
)


any_sequence = given(
    device_name=st.sampled_from(["cpu", "simulated", "simulated", "synchronous"]),
    layers=st.integers(1, 3),
    kv_heads=st.integers(1, 5),
    group=st.integers(1, 4),
    window_tokens=st.sampled_from([0, 0, 1, 2, 13, 40, 300]),
    dims=st.sampled_from([(8, 8), (16, 16), (8, 4), (3, 5)]),
    batch=st.integers(1, 3),
    tile_heads=st.integers(1, 5),
    tile_tokens=st.sampled_from([1, 3, 16, 31, 1000]),
    chunk_tokens=st.sampled_from([1, 2, 7, 16, 64]),
    padded=st.integers(0, 9),
    with_sinks=st.booleans(),
    expected=st.sampled_from([0, 10, 300]),
    resident_tokens=st.sampled_from([0, 0, 1, 7, 40, 500]),
    host_share=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    sequence=changes,
    seed=st.integers(0, 1000),
)


@example(  # a tail that no longer fits behind the resident tokens, and a token that would
    device_name="simulated",
    layers=2,
    kv_heads=2,
    group=1,
    window_tokens=0,
    dims=(8, 8),
    batch=1,
    tile_heads=1,
    tile_tokens=16,
    chunk_tokens=64,
    padded=0,
    with_sinks=False,
    expected=0,
    resident_tokens=40,
    host_share=0.3,
    sequence=[("attend", 30), ("attend", 20), ("decode", 2), ("crop", 25), ("decode", 3)],
    seed=0,
)
def check_changes(
    device_name: str,
    layers: int,
    kv_heads: int,
    group: int,
    window_tokens: int,
    dims: tuple[int, int],
    batch: int,
    tile_heads: int,
    tile_tokens: int,
    chunk_tokens: int,
    padded: int,
    with_sinks: bool,
    expected: int,
    resident_tokens: int,
    host_share: float,
    sequence: list[tuple[str, int]],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = model_shape(
        layers=layers,
        window_tokens=window_tokens,
        kv_heads=kv_heads,
        group=group,
        key_dim=dims[0],
        value_dim=dims[1],
        itemsize=8,
    )
    options = Options.parse(
        tile_heads=min(tile_heads, kv_heads),
        tile_tokens=tile_tokens,
        chunk_tokens=chunk_tokens,
        overlap=device_name != "synchronous",
    )
    device = make_device(device_name, seed)

    def plan() -> Plan:
        plan = resolve(shape, options, device=device.name, batch=batch)
        if device_name == "cpu":
            return plan
        resident = resident_bytes(shape, resident_tokens=resident_tokens, batch=batch)
        return dataclasses.replace(
            plan,
            resident_tokens=resident_tokens,
            resident_bytes=resident,
            host_share=host_share,
        )

    engine = Engine(device, plan(), torch.float64, Stats())
    engine.expect(expected)
    kernels = select_kernels(torch.device("cpu"), torch.float64, *dims)
    windows = [layer.window_tokens for layer in shape.layers]
    plain = Plain(
        windows,
        [draw(batch, kv_heads, 0, dims[0]) for _ in range(layers)],
        [draw(batch, kv_heads, 0, dims[1]) for _ in range(layers)],
    )
    sinks = draw(kv_heads, group) if with_sinks else None
    padded_row = padded > 0 and batch > 1

    def step(tokens: int) -> None:
        valid = None
        total = plain.keys[0].shape[2] + tokens
        if padded_row:
            valid = torch.ones(batch, total, dtype=torch.bool)
            valid[0, :padded] = False
        for layer_idx in range(layers):
            query = draw(batch, kv_heads, group, tokens, dims[0])
            keys = draw(batch, kv_heads, tokens, dims[0])
            values = draw(batch, kv_heads, tokens, dims[1])
            ours = engine.attend(
                layer_idx,
                query.flatten(1, 2),
                keys,
                values,
                kernels=kernels,
                scale=0.3,
                window_tokens=windows[layer_idx] or None,
                padding=padding_seen(valid, tokens, windows[layer_idx]),
                sinks=sinks,
                host_kernels=None if device_name == "cpu" else kernels,
            )
            wanted = plain.attend(layer_idx, query, keys, values, valid, sinks)
            torch.testing.assert_close(ours, wanted.flatten(2, 3), rtol=1e-10, atol=1e-10)

    for kind, amount in sequence:
        if kind == "attend":
            step(amount)
        elif kind == "append":
            for layer_idx in range(layers):
                keys = draw(batch, kv_heads, amount, dims[0])
                values = draw(batch, kv_heads, amount, dims[1])
                engine.append(layer_idx, keys, values)
                plain.keys[layer_idx] = torch.cat((plain.keys[layer_idx], keys), dim=2)
                plain.values[layer_idx] = torch.cat((plain.values[layer_idx], values), dim=2)
        elif kind == "decode":
            for _ in range(amount):
                step(1)
        elif kind == "crop":
            for layer_idx in range(layers):
                engine.crop(layer_idx, amount)
                kept = max(plain.keys[layer_idx].shape[2] - amount, 0)
                plain.keys[layer_idx] = plain.keys[layer_idx][:, :, :kept]
                plain.values[layer_idx] = plain.values[layer_idx][:, :, :kept]
        elif kind == "reorder":
            rows = [(amount * (row + 1)) % batch for row in range(batch)]
            for layer_idx in range(layers):
                engine.select(layer_idx, rows)
            plain.keys = [keys[rows] for keys in plain.keys]
            plain.values = [values[rows] for values in plain.values]
        elif kind == "resize":
            rows = [row % batch for row in range(amount)]
            batch = amount
            engine.select_all(rows, plan())
            plain.keys = [keys[rows] for keys in plain.keys]
            plain.values = [values[rows] for values in plain.values]
            padded_row = padded_row and batch > 1
        elif kind == "replan":
            resident_tokens = amount
            engine.replan(plan())
        else:
            engine.clear()
            plain.keys = [keys[:, :, :0] for keys in plain.keys]
            plain.values = [values[:, :, :0] for values in plain.values]
        assert [engine.tokens(i) for i in range(layers)] == [k.shape[2] for k in plain.keys]
    step(2)
    engine.close()
    if isinstance(device, SimulatedDevice):
        assert device.allocated_bytes == 0
        device.memory.check()


def several(most: int) -> Callable[..., None]:
    settled = settings(
        max_examples=most,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize=True,
    )
    return settled(any_sequence(check_changes))


test_any_sequence_of_changes = several(50)
test_any_of_many_sequences_of_changes = pytest.mark.slow(several(150))


@pytest.mark.parametrize("expected", [0, 1000])
def test_host_memory_is_what_was_planned(expected: int) -> None:
    shape = model_shape()
    plan = resolve(shape, Options(), device="cpu")
    engine = Engine(CpuDevice(), plan, torch.float32, Stats())
    added = engine.expect(expected)
    assert added == plan.kv_host_bytes(expected)
    kernels = reference()
    for layer_idx in range(2):
        new = torch.randn(1, 2, 100, 8)
        engine.attend(
            layer_idx,
            new.repeat_interleave(2, dim=1),
            new,
            new,
            kernels=kernels,
            scale=1.0,
        )
    assert engine.host_kv_bytes == plan.kv_host_bytes(expected or 100)
    one = torch.randn(1, 2, 1, 8)
    for _ in range(300):
        for layer_idx in range(2):
            engine.attend(
                layer_idx,
                one.repeat_interleave(2, dim=1),
                one,
                one,
                kernels=kernels,
                scale=1.0,
            )
    if expected:
        assert engine.host_kv_bytes == plan.kv_host_bytes(expected)
    else:  # grown in segments of at least 256 tokens, at most an eighth of the cache
        assert engine.host_kv_bytes <= plan.kv_host_bytes(100 + 2 * 256)


def test_shapes_the_cache_was_not_made_for_are_refused() -> None:
    engine = Engine(
        CpuDevice(), resolve(model_shape(), Options(), device="cpu"), torch.float32, Stats()
    )
    new = torch.randn(1, 2, 3, 8, dtype=torch.bfloat16)
    with pytest.raises(CacheStateError, match="bfloat16"):
        engine.attend(0, new, new, new, kernels=reference(), scale=1.0)


def test_a_plan_whose_memory_cannot_be_had_closes_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = SimulatedDevice()
    plan = resolve(model_shape(), Options(chunk_tokens=8, tile_tokens=16), device="simulated")
    engine = Engine(device, plan, torch.float32, Stats())
    new, kernels = torch.randn(1, 2, 9, 8), reference()
    engine.attend(0, new, new, new, kernels=kernels, scale=1.0)

    def refuse(_num_bytes: int) -> torch.Tensor:
        raise MemoryPlanError("the device has none left")

    monkeypatch.setattr(device, "device_empty", refuse)
    with pytest.raises(MemoryPlanError):
        engine.replan(plan)
    assert engine.closed
    assert engine.device_kv_bytes == engine.host_kv_bytes == 0
    with pytest.raises(CacheStateError, match="closed"):
        engine.attend(0, new, new, new, kernels=kernels, scale=1.0)
    engine.close()


class Failing(ReferenceKernel):
    """Fails on demand."""

    left = -1  # calls until it does; never while negative

    def attend(self, work):
        self.left -= 1
        if self.left == 0:
            raise MemoryError("no more")
        super().attend(work)


@pytest.mark.parametrize("resident_tokens", [0, 10, 90])
def test_failures_that_the_caller_keeps_take_nothing_from_the_cache(resident_tokens: int) -> None:
    """A kept exception keeps the frames it came through, and so the tile that was attended then."""
    shape = model_shape(layers=2, kv_heads=2, group=3, key_dim=16, value_dim=16, itemsize=8)
    options = Options.parse(tile_heads=1, tile_tokens=16, chunk_tokens=16)
    plan = dataclasses.replace(
        resolve(shape, options, device="simulated"),
        resident_tokens=resident_tokens,
        resident_bytes=resident_bytes(shape, resident_tokens=resident_tokens, batch=1),
    )
    engine = Engine(SimulatedDevice(), plan, torch.float64, Stats())
    keys, values = (torch.randn(1, 2, 60, 16, dtype=torch.float64) for _ in range(2))
    query = torch.randn(1, 2, 3, 60, 16, dtype=torch.float64)
    kept, kernel = [], Failing()

    def attend(layer_idx: int, part: slice) -> torch.Tensor:
        new = query[:, :, :, part].flatten(1, 2), keys[:, :, part], values[:, :, part]
        return engine.attend(layer_idx, *new, kernels=only(kernel), scale=0.3)

    for _ in range(5):
        engine.clear()
        for layer_idx in range(2):
            attend(layer_idx, slice(0, 50))
        kernel.left = 1 if resident_tokens == 90 else 3
        with pytest.raises(MemoryError) as failure:
            attend(0, slice(50, 51))
        kept.append(failure.value)
        assert resident_tokens < 90 or engine.tokens(0) == 50
    engine.clear()
    for layer_idx in range(2):
        attend(layer_idx, slice(0, 59))
        ours = attend(layer_idx, slice(59, 60))
        wanted = attended(reference(), query[:, :, :, 59:], keys, values, scale=0.3)
        torch.testing.assert_close(ours, wanted.out.permute(0, 3, 1, 2, 4).flatten(2, 3))
