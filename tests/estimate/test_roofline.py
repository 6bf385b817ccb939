"""The roofline: the paper's Table 12 cell by cell, other machines, and what must hold for all."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headinfer.errors import OptionError
from headinfer.estimate.machines import HARDWARE, preset_hardware
from headinfer.estimate.roofline import (
    Bound,
    Operator,
    Phase,
    Row,
    link_hidden_from_tokens,
    roofline_rows,
)
from headinfer.estimate.roofline_paper import Cell, Column, Reason, compare
from headinfer.plan.shape import LayerKind, LayerShape, ModelShape
from shapes import LLAMA_3_8B, model_shape

RTX_4090 = preset_hardware("rtx-4090")
K = 1024


def row_of(
    phase: Phase, operator: Operator, tokens: int, machine: str = "rtx-4090", **options: bool
) -> Row:
    (row,) = (
        row
        for row in roofline_rows(LLAMA_3_8B, preset_hardware(machine), [tokens], **options)
        if (row.phase, row.operator) == (phase, operator)
    )
    return row


def test_prefill_of_all_heads_by_hand() -> None:
    row = row_of(Phase.PREFILL, Operator.FLASH_ATTENTION, K)
    assert row.operations == 4 * K * K * 32 * 128
    assert row.device.bytes == 2 * K * 128 * (32 + 32 + 8 + 8)
    assert row.offloaded.bytes == 2 * K * 128 * (8 + 8)
    assert (row.device.bound, row.device.attainable_flops_per_s) == (Bound.COMPUTE, 165e12)
    assert row.offloaded.bound is Bound.LINK
    assert row.offloaded.attainable_flops_per_s == pytest.approx(4096 * 25e9)


def test_decode_reads_keys_and_values_once_for_each_kv_head() -> None:
    row = row_of(Phase.DECODE, Operator.FLASH_ATTENTION, 100 * K)
    assert row.operations == 4 * 100 * K * 32 * 128
    assert row.device.bytes == 2 * 128 * (100 * K * (8 + 8) + 32 + 32)
    assert row.offloaded.intensity_flops_per_byte == 4  # the group of query heads
    assert row.offloaded.attainable_flops_per_s == pytest.approx(100e9)
    assert (row.device.bound, row.offloaded.bound) == (Bound.MEMORY, Bound.LINK)


@pytest.mark.parametrize("machine", HARDWARE)
@pytest.mark.parametrize("phase", Phase)
def test_head_wise_is_one_kv_head_at_the_same_intensity(machine: str, phase: Phase) -> None:
    whole = row_of(phase, Operator.FLASH_ATTENTION, 10 * K, machine)
    head = row_of(phase, Operator.HEAD_WISE, 10 * K, machine)
    assert (head.query_heads, head.kv_heads) == (4, 1)
    assert 8 * head.operations == whole.operations
    assert 8 * head.device.bytes == whole.device.bytes
    for side in ("device", "offloaded"):
        one, all_of_them = getattr(head, side), getattr(whole, side)
        assert one.attainable_flops_per_s == pytest.approx(all_of_them.attainable_flops_per_s)
        assert one.bound is all_of_them.bound


def test_table_13_is_the_same_counts_under_the_ceilings_of_the_a100() -> None:
    small, large = (
        row_of(Phase.PREFILL, Operator.HEAD_WISE, tokens, "a100-80gb") for tokens in (K, 10 * K)
    )
    decode = row_of(Phase.DECODE, Operator.HEAD_WISE, K, "a100-80gb")
    assert small.operations == row_of(Phase.PREFILL, Operator.HEAD_WISE, K).operations
    assert small.offloaded.attainable_flops_per_s == pytest.approx(102.4e12)
    assert (large.offloaded.attainable_flops_per_s, large.offloaded.bound) == (
        312e12,
        Bound.COMPUTE,
    )
    assert decode.device.attainable_flops_per_s == pytest.approx(8e12, rel=0.01)


def test_a_causal_mask_leaves_half_of_prefill() -> None:
    full, half = (
        row_of(Phase.PREFILL, Operator.FLASH_ATTENTION, K, causal=causal)
        for causal in (False, True)
    )
    assert half.operations == full.operations * (K + 1) // (2 * K)
    assert half.device.bytes == full.device.bytes
    decode = row_of(Phase.DECODE, Operator.FLASH_ATTENTION, K, causal=True)
    assert decode == row_of(Phase.DECODE, Operator.FLASH_ATTENTION, K)


def cells(phase: Phase, operator: Operator, tokens: int) -> dict[tuple[bool, Column], Cell]:
    (found,) = (
        found
        for row, found in compare(LLAMA_3_8B)
        if (row.phase, row.operator, row.context_tokens) == (phase, operator, tokens)
    )
    return {(cell.offloaded, cell.column): cell for cell in found}


def test_every_cell_of_table_12_agrees_or_says_why() -> None:
    compared = list(compare(LLAMA_3_8B))
    assert [len(found) for _, found in compared] == [9] * 12
    differing = [cell for _, found in compared for cell in found if cell.reason]
    # Prefill: two bounds by name and two rates of another device. Decode: three regular and four
    # offloaded cells in each of six rows.
    assert len(differing) == 2 + 2 + 6 * (3 + 4)
    assert {cell.reason for cell in differing} == set(Reason)
    for _, found in compared:
        assert found[0].reason is None  # operations


@pytest.mark.parametrize(
    ("place", "key", "reason"),
    [
        ((Phase.PREFILL, Operator.FLASH_ATTENTION, 10 * K), (False, Column.BYTES), None),
        ((Phase.PREFILL, Operator.HEAD_WISE, K), (True, Column.BYTES), None),
        ((Phase.PREFILL, Operator.HEAD_WISE, 10 * K), (True, Column.RATE), Reason.OTHER_DEVICE),
        ((Phase.DECODE, Operator.HEAD_WISE, K), (False, Column.BYTES), Reason.QUERY_HEADS),
        ((Phase.DECODE, Operator.HEAD_WISE, K), (True, Column.RATE), Reason.SLOW_LINK),
        ((Phase.DECODE, Operator.HEAD_WISE, K), (True, Column.BOUND), Reason.NAMED_LINK),
        ((Phase.DECODE, Operator.HEAD_WISE, K), (False, Column.BOUND), None),
    ],
)
def test_reasons(
    place: tuple[Phase, Operator, int], key: tuple[bool, Column], reason: Reason | None
) -> None:
    assert cells(*place)[key].reason is reason


def test_without_a_link_nothing_is_offloaded() -> None:
    cpu = dataclasses.replace(RTX_4090, link_bytes_per_s=None, link_back_bytes_per_s=None)
    assert all(row.offloaded is None for row in roofline_rows(LLAMA_3_8B, cpu))
    assert link_hidden_from_tokens(LLAMA_3_8B, cpu) is None


def test_the_link_hides_from_the_chunk_it_says() -> None:
    tokens = link_hidden_from_tokens(LLAMA_3_8B, RTX_4090)
    assert tokens == 1650  # 165e12 / 25e9 FLOP/byte x 2 bytes / (2 x group of 4)
    bounds = [
        row_of(Phase.PREFILL, Operator.FLASH_ATTENTION, count).offloaded.bound
        for count in (tokens - 1, tokens)
    ]
    assert bounds == [Bound.LINK, Bound.COMPUTE]


def test_the_first_layer_that_attends_everything_is_counted() -> None:
    window = LayerShape(
        kind=LayerKind.SLIDING, kv_heads=4, key_dim=64, value_dim=64, window_tokens=100
    )
    full = LayerShape(kind=LayerKind.FULL, kv_heads=2, key_dim=192, value_dim=128)
    shape = dataclasses.replace(LLAMA_3_8B, layers=(window, full))
    row = roofline_rows(shape, RTX_4090, [1000])[0]
    assert row.operations == 2 * 1000 * 1000 * 32 * (192 + 128)
    assert row.offloaded.bytes == 2 * 1000 * 2 * (192 + 128)
    with pytest.raises(OptionError, match="no layer that attends the whole context"):
        roofline_rows(dataclasses.replace(shape, layers=(window,)), RTX_4090)


@given(
    shape=st.builds(
        model_shape,
        kv_heads=st.integers(1, 16),
        group=st.integers(1, 16),
        key_dim=st.integers(1, 256),
        value_dim=st.integers(1, 256),
        itemsize=st.sampled_from([1, 2, 4]),
    ),
    name=st.sampled_from(sorted(HARDWARE)),
    tokens=st.integers(1, 2**24),
    causal=st.booleans(),
)
def test_no_rate_exceeds_a_roof_and_one_is_met(
    shape: ModelShape, name: str, tokens: int, causal: bool
) -> None:
    machine = preset_hardware(name)
    for row in roofline_rows(shape, machine, [tokens], causal=causal):
        memory = row.operations / row.device.bytes * machine.device_bytes_per_s
        link = row.operations / row.offloaded.bytes * machine.link_bytes_per_s
        roofs = {Bound.COMPUTE: machine.matmul_flops_per_s, Bound.MEMORY: memory}
        assert row.device.attainable_flops_per_s == pytest.approx(min(roofs.values()))
        assert row.device.attainable_flops_per_s == pytest.approx(roofs[row.device.bound])
        roofs[Bound.LINK] = link
        assert row.offloaded.attainable_flops_per_s == pytest.approx(min(roofs.values()))
        assert row.offloaded.attainable_flops_per_s == pytest.approx(roofs[row.offloaded.bound])
        assert row.offloaded.bytes < row.device.bytes
