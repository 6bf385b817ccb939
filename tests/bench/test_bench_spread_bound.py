"""Bounds of several GPUs against numbers computed by hand."""

from dataclasses import replace

import pytest

from headinfer.bench.bound import Rates, Work, bound, decode_work, prefill_work
from headinfer.bench.catalogue import Spread
from headinfer.bench.held import HeldPart
from headinfer.bench.model_spec import ModelSpec
from headinfer.bench.spread_bound import above_disk, spread_decode_bound, spread_prefill_bound

MODEL = ModelSpec(
    layers=4,
    hidden_size=512,
    heads=16,
    kv_heads=4,
    head_dim=128,
    intermediate_size=2048,
    vocab_size=4096,
)
TOKENS = 32768
KV_BYTES = 256 * 2**20
LAYER_BYTES, HEAD_BYTES = 2 * MODEL.layer_parameters, 2 * MODEL.head_parameters
RATES = Rates(
    host_bytes_per_s=100e9,
    matmul_flops_per_s=1e18,
    device_bytes_per_s=1000e9,
    link_bytes_per_s=50e9,
    host_shared_bytes_per_s=120e9,
    links_bytes_per_s=80e9,
)


def part(layers: int, streamed: int, attended: int = 0, kv: int = KV_BYTES // 2) -> HeldPart:
    return HeldPart(
        layers=layers,
        kv_bytes=kv,
        streamed_bytes=streamed,
        host_attended_bytes=attended,
        resident_tokens=0,
    )


def decode(spread: Spread, *parts: HeldPart, rates: Rates = RATES):
    return spread_decode_bound(MODEL, "bfloat16", TOKENS, parts, spread, rates)


def test_layers_take_the_sum_of_what_each_gpu_takes():
    found = decode(Spread.LAYERS, part(2, 40 * 2**20), part(2, 0))
    reads_s = (LAYER_BYTES / 2 + HEAD_BYTES + KV_BYTES / 2) / 1000e9
    assert found.seconds == pytest.approx(40 * 2**20 / 50e9 + reads_s)
    assert found.limited_by == "link"


def test_one_gpu_alone_has_the_bound_of_one():
    alone = decode(Spread.LAYERS, part(4, 100 * 2**20, 30 * 2**20, KV_BYTES))
    work = decode_work(
        MODEL,
        "bfloat16",
        TOKENS,
        on_device=True,
        streamed_kv_bytes=100 * 2**20,
        host_kv_bytes=30 * 2**20,
    )
    assert alone == bound(work, RATES)


def test_heads_take_what_the_slowest_rank_takes():
    reads_s = (LAYER_BYTES + HEAD_BYTES + KV_BYTES) / 2 / 1000e9
    few, many = part(4, 0), part(4, 60 * 2**20)
    assert decode(Spread.HEADS, few, few).seconds == pytest.approx(reads_s)
    # Each of two links has half of what they reach together.
    assert decode(Spread.HEADS, few, many).seconds == pytest.approx(60 * 2**20 / 40e9)


def test_heads_share_the_memory_of_the_host():
    both = part(4, 10 * 2**20, 50 * 2**20)
    found = decode(Spread.HEADS, both, both)
    assert found.seconds == pytest.approx(max(120 / 120e9, 100 / 100e9) * 2**20)
    assert found.limited_by in ("host memory", "host memory and link")


@pytest.mark.parametrize("spread", [Spread.LAYERS, Spread.HEADS])
def test_all_gpus_work_at_a_prompt(spread):
    slow = Rates(
        host_bytes_per_s=1e15,
        matmul_flops_per_s=1e12,
        device_bytes_per_s=1e15,
        link_bytes_per_s=1e15,
    )
    parts = (part(2, 0), part(2, 0))
    found = spread_prefill_bound(
        MODEL, "bfloat16", TOKENS, parts, spread, slow, kv_host_bytes=KV_BYTES
    )
    whole = prefill_work(MODEL, "bfloat16", TOKENS, on_device=True, streamed_kv_bytes=0)
    assert found.seconds == pytest.approx(bound(whole, slow).seconds / 2)


def test_one_disk_is_below_all_of_them():
    alone = decode(Spread.LAYERS, part(2, 40 * 2**20), part(2, 0))
    rates = replace(RATES, disk_read_bytes_per_s=2e9, disk_write_bytes_per_s=1e9)
    reads = Work(disk_read_bytes=3e9, device_bytes=1e15)  # the devices' is in the bound before
    found = above_disk(alone, reads, rates)
    assert (found.seconds, found.limited_by) == (1.5, "disk")
    assert above_disk(alone, Work(disk_written_bytes=3e9), rates).seconds == 3
    for little in (Work(disk_read_bytes=1e3), Work()):
        assert above_disk(alone, little, rates) == alone
    assert above_disk(alone, reads, RATES) == alone  # a run without a disk
