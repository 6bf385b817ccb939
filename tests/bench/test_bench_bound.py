"""Bounds against numbers computed by hand."""

from dataclasses import replace

import pytest
from bench_parts import MACHINE, FakeLauncher, NoProgress, bench_spec, trial_result

from headinfer.bench.bound import (
    Bound,
    Rates,
    Work,
    bound,
    decode_work,
    prefill_flops,
    prefill_work,
)
from headinfer.bench.model_spec import ModelSpec
from headinfer.bench.result import TrialResult
from headinfer.bench.spec import TrialSpec
from headinfer.bench.suite import Suite

# The shape of the speed requirement: 4 layers, hidden 512, 16 query and 4 KV heads of 128.
MODEL = ModelSpec(
    layers=4,
    hidden_size=512,
    heads=16,
    kv_heads=4,
    head_dim=128,
    intermediate_size=2048,
    vocab_size=4096,
)
# One layer: q and o 512 x 2048 each, k and v 512 x 512 each, three of 512 x 2048, two norms.
LAYER_PARAMETERS = 4 * (2 * 1048576 + 2 * 262144 + 3 * 1048576 + 1024) + 512
HEAD_PARAMETERS = 4096 * 512


def test_parameters_are_those_of_the_model_transformers_makes():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=512,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=2048,
        vocab_size=4096,
        tie_word_embeddings=False,
    )
    made = sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())
    assert MODEL.layer_parameters == LAYER_PARAMETERS
    assert made == LAYER_PARAMETERS + 2 * HEAD_PARAMETERS


def test_kv_bytes_of_32k_tokens_in_bfloat16_are_256_mib():
    assert MODEL.kv_bytes(32768, "bfloat16") == 256 * 2**20
    assert MODEL.kv_bytes(32768, "float32") == 512 * 2**20


def test_decode_on_the_cpu_reads_weights_and_kv_once():
    work = decode_work(MODEL, "bfloat16", 32768, on_device=False, streamed_kv_bytes=0)
    assert work.host_bytes == 2 * (LAYER_PARAMETERS + HEAD_PARAMETERS) + 268435456
    assert work.device_bytes == work.link_bytes == 0
    rates = Rates(host_bytes_per_s=10e9, matmul_flops_per_s=1e15)
    assert bound(work, rates).seconds == pytest.approx(0.0318, rel=1e-2)
    assert bound(work, rates).limited_by == "host memory"


def test_decode_on_a_device_is_bound_by_the_link_when_kv_streams():
    rates = Rates(
        host_bytes_per_s=10e9,
        matmul_flops_per_s=1e15,
        device_bytes_per_s=1e12,
        link_bytes_per_s=25e9,
    )
    streamed = decode_work(MODEL, "bfloat16", 32768, on_device=True, streamed_kv_bytes=268435456)
    assert bound(streamed, rates) == Bound(seconds=268435456 / 25e9, limited_by="link")
    held = decode_work(MODEL, "bfloat16", 32768, on_device=True, streamed_kv_bytes=0)
    assert bound(held, rates).limited_by == "device memory"
    assert bound(held, rates).seconds == pytest.approx(318e6 / 1e12, rel=1e-2)


def test_prefill_counts_parameters_twice_and_half_a_square_of_attention():
    attention = 4 * 16 * 4 * 128 * 32768**2 / 2  # layers, heads, two products of two operations
    projections = 2 * LAYER_PARAMETERS * 32768 + 2 * HEAD_PARAMETERS
    assert prefill_flops(MODEL, 32768) == attention + projections
    work = prefill_work(MODEL, "bfloat16", 32768, on_device=False, streamed_kv_bytes=0)
    rates = Rates(host_bytes_per_s=10e9, matmul_flops_per_s=100e9)
    assert bound(work, rates).limited_by == "matmul"
    assert bound(work, rates).seconds == pytest.approx((attention + projections) / 100e9)
    assert bound(work, rates).seconds == pytest.approx(191, rel=1e-2)


def test_the_slowest_part_is_the_bound():
    work = Work(host_bytes=10, device_bytes=100, link_bytes=30, flops=50)
    rates = Rates(
        host_bytes_per_s=1, matmul_flops_per_s=1, device_bytes_per_s=10, link_bytes_per_s=1
    )
    assert bound(work, rates) == Bound(seconds=50, limited_by="matmul")


def test_link_and_cpu_share_the_hosts_memory():
    rates = Rates(
        host_bytes_per_s=100,
        matmul_flops_per_s=1,
        device_bytes_per_s=1000,
        link_bytes_per_s=50,
        host_shared_bytes_per_s=110,
    )
    at_once = bound(Work(host_bytes=900, link_bytes=400), rates)
    assert at_once == Bound(seconds=1300 / 110, limited_by="host memory and link")
    assert bound(Work(link_bytes=400), rates) == Bound(seconds=8, limited_by="link")
    assert bound(Work(host_bytes=900), replace(rates, host_shared_bytes_per_s=None)).seconds == 9


@pytest.mark.parametrize(
    ("behind", "attended", "accepted", "rate"),
    [
        (0.0, 10**9, None, 6e9),  # a step of 0.25 s reads 0.5 GB and 1 GB
        (8e9, 10**9, None, 8e9),
        (8e9, 10**9, 4.0, 8e9),
        (0.0, 10**9, 4.0, 5e9),  # a step is of several tokens
        (0.0, 0, None, 5e9),  # the link alone
    ],
)
def test_the_most_that_cpu_and_link_were_seen_to_read_is_the_bound(
    behind: float, attended: int, accepted: float | None, rate: float
):
    def measured(_spec: TrialSpec) -> TrialResult:
        return replace(
            trial_result(decode_s=(0.25, 0.2, 0.5), device="cuda"),
            streamed_kv_bytes=5 * 10**8,
            host_attended_kv_bytes=attended,
            host_shared_bytes_per_s=behind,
            accepted_per_verify=accepted,
        )

    rates = replace(
        MACHINE.rates, host_bytes_per_s=1e10, link_bytes_per_s=5e9, host_shared_bytes_per_s=5e9
    )
    rates = replace(rates, matmul_flops_per_s=1e15)
    spec = bench_spec(methods=("resident",))
    (row,) = Suite(spec, FakeLauncher(measured), rates, NoProgress()).run()
    assert row.host_shared_bytes_per_s == rate
    assert row.bound_fraction == pytest.approx((5e8 + attended) / rate / 0.25 if attended else 0.4)
