"""The Triton program of `fused_merge`; imports Triton, which not every system has."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["kv_heads", "group", "q_len"])
def merge_two(
    first,
    first_lse,
    second,
    second_lse,
    sinks,
    out,
    out_lse,
    kv_heads,
    group,
    q_len,
    first_batch,
    first_head,
    first_group,
    first_token,
    second_batch,
    second_head,
    second_group,
    second_token,
    out_batch,
    out_head,
    out_group,
    out_token,
    DIM: tl.constexpr,
    SECOND: tl.constexpr,
    SINKS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Merge two partials, or one alone, and attention sinks by LSE.

    Grid: (blocks of tokens, batch * kv_heads * group). Outputs `[batch, kv_heads, group, q_len,
    DIM]` are read and written by their strides; `out`, in its dtype, may be `first`. LSE are
    contiguous, `[batch, kv_heads, group, q_len]`, as is `sinks[kv_heads, group]`; `out_lse` is
    memory of its own.
    """
    row = tl.program_id(1)
    member = (row % group).to(tl.int64)
    head = ((row // group) % kv_heads).to(tl.int64)
    batch = (row // (group * kv_heads)).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    dims = tl.arange(0, BLOCK_DIM)
    real = tokens < q_len
    both = real[:, None] & (dims < DIM)[None, :]
    places = row.to(tl.int64) * q_len + tokens

    start = batch * first_batch + head * first_head + member * first_group
    lse = tl.load(first_lse + places, mask=real, other=float("-inf"))
    part = first + start + tokens[:, None] * first_token + dims[None, :]
    total = tl.load(part, mask=both, other=0.0).to(tl.float32)
    highest = lse
    if SECOND:
        other_lse = tl.load(second_lse + places, mask=real, other=float("-inf"))
        highest = tl.maximum(highest, other_lse)
    if SINKS:
        sink = tl.load(sinks + head * group + member).to(tl.float32)
        highest = tl.maximum(highest, sink)
    # Where nothing is visible, 0 in place of -inf keeps -inf - -inf out.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp(lse - base)
    total = total * weight[:, None]
    if SECOND:
        start = batch * second_batch + head * second_head + member * second_group
        part = second + start + tokens[:, None] * second_token + dims[None, :]
        other_weight = tl.exp(other_lse - base)
        total += tl.load(part, mask=both, other=0.0).to(tl.float32) * other_weight[:, None]
        weight += other_weight
    if SINKS:
        weight += tl.exp(sink - base)
    nothing = weight == 0.0
    total = total / tl.where(nothing, 1.0, weight)[:, None]

    start = batch * out_batch + head * out_head + member * out_group
    place_out = out + start + tokens[:, None] * out_token + dims[None, :]
    tl.store(place_out, total.to(out.dtype.element_ty), mask=both)
    if WITH_LSE:
        merged = base + tl.log(tl.where(nothing, 1.0, weight))
        tl.store(out_lse + places, tl.where(nothing, float("-inf"), merged), mask=real)
