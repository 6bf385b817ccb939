"""Plans of tokens that are packed in host memory: fewer bytes there, and what packing takes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from headinfer.estimate.machines import HARDWARE
from headinfer.packed.layout import PageLayout
from headinfer.plan.format import Format
from headinfer.plan.memory import resident_bytes
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.predict import Predictor
from headinfer.plan.raw_room import raw_room
from headinfer.plan.resolve import resolve
from headinfer.plan.shape import LayerKind, LayerShape, ModelShape, StreamingHeads
from shapes import LLAMA_3_8B, model_shape

PAGE_BYTES = PageLayout(128).page_bytes
OPTIONS = Options.parse(device_memory="24GiB", tile_heads=8, tile_tokens=4096, resident_tokens=0)


def planned(shape: ModelShape) -> Plan:
    return resolve(shape, OPTIONS, device="cuda", context_tokens=2**17)


def test_tokens_take_whole_pages_in_host_memory() -> None:
    packed = LLAMA_3_8B.packed
    for tokens, pages in ((1, 1), (64, 1), (65, 2)):
        assert packed.host_kv_bytes(tokens, 3) == 3 * 32 * 8 * pages * 2 * PAGE_BYTES
        assert packed.kv_bytes(tokens) == LLAMA_3_8B.kv_bytes(tokens)
    assert packed.packed_share == PAGE_BYTES / (64 * 128 * 2) < 0.775
    assert (packed.dense, LLAMA_3_8B.packed_share) == (LLAMA_3_8B, 1.0)


def test_device_memory_has_packed_tiles_and_one_that_is_unpacked() -> None:
    dense, packed = planned(LLAMA_3_8B), planned(LLAMA_3_8B.packed)
    assert (dense.unpacked_bytes, dense.packed_bytes, dense.raw_page_bytes) == (0, 0, 0)
    assert packed.staging_bytes == 3 * 8 * (4096 // 64 + 1) * 2 * PAGE_BYTES
    assert packed.unpacked_bytes == 8 * (4096 + 64) * 2 * 128 * 2
    assert packed.packed_bytes == 2 * 8 * (packed.chunk_tokens // 64 + 1) * 2 * PAGE_BYTES
    lead = 2**15 // packed.chunk_tokens
    assert lead >= 2
    assert (
        packed.raw_page_bytes
        == (lead * (packed.chunk_tokens // 64 + 1) + 32) * 8 * 2 * 64 * 128 * 2
    )
    added = packed.unpacked_bytes + packed.packed_bytes
    assert packed.arena_bytes - dense.arena_bytes == added + (
        packed.staging_bytes - dense.staging_bytes
    )
    host_bytes = packed.shape.host_kv_bytes(2**17)
    assert packed.kv_host_bytes(2**17) == host_bytes + packed.raw_page_bytes
    assert any(line.startswith("CPU memory") and "packed" in line for line in packed.lines())


def test_pages_that_do_not_pack_have_room_by_where_a_chunk_comes_to_the_layers() -> None:
    """A device has room for the chunks that others work on behind it, and for a lead."""
    layer_bytes = (8192 // 64 + 1) * 8 * 2 * 64 * 128 * 2
    shape = dataclasses.replace(LLAMA_3_8B.packed, layers=LLAMA_3_8B.packed.layers[:10])
    sizes: dict[str, Any] = {"chunk_tokens": 8192, "batch": 1}
    for stage, context, wanted in (
        (0, None, 4),
        (1, None, 16),
        (3, None, 36),
        (3, 8192 + 1, 20),  # fewer chunks than that have fewer pages
        (0, 100, 4),
    ):
        own = dataclasses.replace(shape, stage=stage)
        room = raw_room(own, **sizes, context_tokens=context)
        assert room.block_chunks == 4
        assert room.num_bytes == wanted * layer_bytes
    for chunk_tokens, lead in ((2**16, 2), (2**12, 8), (64, 10)):
        sizes["chunk_tokens"] = chunk_tokens
        assert raw_room(shape, **sizes, context_tokens=None).block_chunks == lead


def test_the_documents_say_what_that_room_takes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "several-gpus.md").read_text()
    for name, layers, gpus in (
        ("llama-3-8b", 32, 1),
        ("llama-3-8b", 32, 2),
        ("llama-3-70b", 80, 2),
        ("llama-3-70b", 80, 4),
        ("llama-3-70b", 80, 8),
    ):
        one, own = LLAMA_3_8B.packed.layers[0], layers // gpus  # both have 8 KV heads of 128
        shapes = [
            dataclasses.replace(LLAMA_3_8B, layers=(one,) * own, stage=stage)
            for stage in range(gpus)
        ]
        sizes: dict[str, Any] = {"chunk_tokens": 8192, "batch": 1, "context_tokens": None}
        num_bytes = sum(raw_room(shape, **sizes).num_bytes for shape in shapes)
        assert f"| {name} | {gpus} | {num_bytes / 2**30:.2f} GiB |" in text


def test_tiles_begin_where_pages_do() -> None:
    options = Options.parse(device_memory="24GiB")
    plan = resolve(LLAMA_3_8B.packed, options, device="cuda", context_tokens=2**20)
    assert plan.resident_tokens % 64 == 0 < plan.resident_tokens
    spare = plan.device_memory_bytes - plan.total_device_bytes
    assert 0 <= spare < resident_bytes(plan.shape, resident_tokens=64, batch=1)
    assert plan.tile_tokens % 64 == 0


def test_what_the_link_bounds_takes_as_much_less_time() -> None:
    times = []
    for shape in (LLAMA_3_8B, LLAMA_3_8B.packed):
        plan = planned(shape)
        predictor = Predictor(shape, HARDWARE["h100-80gb"])
        parts = predictor.decode(plan.placement, 2**17)
        assert parts.limited_by == "the link"
        times.append(parts.link_s)
        assert plan.streamed_bytes(2**17) == shape.host_kv_bytes(2**17)
    assert times[1] / times[0] == pytest.approx(PAGE_BYTES / (64 * 128 * 2))


def test_only_what_all_queries_see_and_packs_is_packed() -> None:
    assert not model_shape(key_dim=24, value_dim=16).packed.packs
    layer = LayerShape(kind=LayerKind.FULL, kv_heads=4, key_dim=16, value_dim=32)
    heads = StreamingHeads(heads=(1, 2), sink_tokens=4, recent_tokens=8)
    layers = (
        dataclasses.replace(layer, streaming=heads),
        dataclasses.replace(layer, kind=LayerKind.SLIDING, window_tokens=8),
        dataclasses.replace(layer, value_dim=24),
    )
    shape = dataclasses.replace(model_shape(itemsize=2), layers=layers).packed
    formats = [track.host_format for each in shape.layers for track in each.tracks]
    assert formats == [Format.PACKED, Format.DENSE, Format.DENSE, Format.DENSE]
