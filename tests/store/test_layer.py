"""The host store against a plain tensor."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headinfer.device.cpu import CpuDevice
from headinfer.store.host_memory import available_host_bytes
from headinfer.store.layer import KVGeometry, LayerStore

GEOMETRY = KVGeometry(batch=2, kv_heads=3, key_dim=4, value_dim=2, dtype=torch.float32)


def append(store: LayerStore, keys: torch.Tensor, values: torch.Tensor) -> None:
    first = 0
    for span in store.extend(keys.shape[2]):
        part = slice(first, first + span.tokens)
        span.keys.copy_(keys[:, :, part])
        span.values.copy_(values[:, :, part])
        first += span.tokens
    assert first == keys.shape[2]


def contents(store: LayerStore, max_tokens: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    spans = list(store.spans(0, store.tokens, max_tokens=max_tokens))
    starts = [span.start for span in spans]
    assert starts == sorted(starts)
    assert all(span.tokens <= (max_tokens or span.tokens) for span in spans)
    keys = [span.keys for span in spans] or [torch.empty(store.geometry.batch, 3, 0, 4)]
    values = [span.values for span in spans] or [torch.empty(store.geometry.batch, 3, 0, 2)]
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


@settings(deadline=None)
@given(
    reserve=st.integers(0, 900),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 400)),
            st.tuples(st.just("crop"), st.integers(0, 300)),
            st.tuples(st.just("select"), st.integers(1, 4)),
        ),
        max_size=8,
    ),
    max_tokens=st.sampled_from([None, 1, 7, 300]),
)
def test_any_sequence(reserve: int, steps: list[tuple[str, int]], max_tokens: int | None) -> None:
    store = LayerStore(CpuDevice(), GEOMETRY)
    store.reserve(reserve)
    assert store.num_bytes == GEOMETRY.num_bytes(reserve)
    keys, values = torch.empty(2, 3, 0, 4), torch.empty(2, 3, 0, 2)
    for kind, amount in steps:
        version = store.version
        if kind == "append":
            new = torch.randn(keys.shape[0], 3, amount, 6)
            append(store, new[..., :4], new[..., 4:])
            keys = torch.cat((keys, new[..., :4]), dim=2)
            values = torch.cat((values, new[..., 4:]), dim=2)
        elif kind == "crop":
            kept = max(keys.shape[2] - amount, 0)
            store.crop(kept)
            keys, values = keys[:, :, :kept], values[:, :, :kept]
        else:
            rows = [(row * 2 + 1) % keys.shape[0] for row in range(amount)]
            store.select(rows)
            keys, values = keys[rows], values[rows]
        assert store.version != version
        assert store.tokens == keys.shape[2]
        for stored, wanted in zip(contents(store, max_tokens), (keys, values), strict=True):
            assert torch.equal(stored, wanted)
    store.clear()
    assert store.num_bytes == store.tokens == 0


def test_rows_are_chosen_whatever_device_new_tensors_have_by_default() -> None:
    store = LayerStore(CpuDevice(), GEOMETRY)
    new = torch.randn(2, 3, 7, 6)
    append(store, new[..., :4], new[..., 4:])
    with torch.device("meta"):
        store.select([1, 0])
        store.select([1, 1, 0])
    (span,) = store.spans(0, 7)
    assert torch.equal(span.keys, new[[0, 0, 1], :, :, :4])


def test_old_tokens_are_never_moved_by_growth() -> None:
    store = LayerStore(CpuDevice(), GEOMETRY)
    append(store, torch.ones(2, 3, 10, 4), torch.ones(2, 3, 10, 2))
    before = next(iter(store.spans(0, 10))).keys.data_ptr()
    append(store, torch.ones(2, 3, 5000, 4), torch.ones(2, 3, 5000, 2))
    assert next(iter(store.spans(0, 10))).keys.data_ptr() == before


def test_one_heads_tokens_are_contiguous() -> None:
    store = LayerStore(CpuDevice(), GEOMETRY)
    store.reserve(100)
    store.extend(90)
    for span in store.spans(5, 60, heads=slice(1, 3)):
        assert span.keys.shape == (2, 2, 55, 4)
        assert span.keys[1, 1].is_contiguous()
        assert span.values[0, 0].is_contiguous()


def test_available_host_memory_is_plausible() -> None:
    assert 2**20 < available_host_bytes() < 2**50
