"""The merge of partials by LSE on CUDA: programs, and what the others merge with.

Partials are merged in three places: here, in `partial` by torch, in `native/merge.h` by the C
kernels. There is no fourth. Imports Triton, which not every system has.
"""

import triton
import triton.language as tl


@triton.jit
def _weigh(highest, lse, lse_highest):
    """Weigh partials against sums of others that refer to the LSE `highest`.

    Every merge is this: sums of outputs and of weights are multiplied by the factor. The outputs
    and weights of the new partials, times their weights, are added.

    Args:
        highest: -inf before the first.
        lse: of the partials, each.
        lse_highest: the highest of them.

    Returns:
        The LSE to which the sums refer from now on, the factor and the weights.
    """
    new_highest = tl.maximum(highest, lse_highest)
    # Where nothing was visible so far, 0 in place of -inf keeps -inf - -inf out.
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    return new_highest, tl.exp(highest - base), tl.exp(lse - base)


@triton.jit
def _lse_of(weight, highest):
    """Return the LSE of a sum of weights; -inf where there are none."""
    nothing = weight == 0.0
    return tl.where(nothing, float("-inf"), highest + tl.log(tl.where(nothing, 1.0, weight)))


@triton.jit
def merge_row(
    parts,
    lses,
    place,
    all_rows,
    used,
    DIM: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Merge the first `used` partials of query row `place`.

    Loads pass by the multiprocessor's own cache, which may hold what others have overwritten.

    Returns:
        The weighted sum of the outputs `[BLOCK_DIM]`, its weight, and the LSE that both refer to.
    """
    dims = tl.arange(0, BLOCK_DIM)
    highest = float("-inf")
    weight = 0.0
    total = tl.zeros([BLOCK_DIM], tl.float32)
    for start in range(0, used, BLOCK_SLOTS):
        numbers = start + tl.arange(0, BLOCK_SLOTS)
        real = numbers < used
        places = numbers.to(tl.int64) * all_rows + place
        lse = tl.load(lses + places, mask=real, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            parts + places[:, None] * DIM + dims[None, :],
            mask=real[:, None] & (dims < DIM)[None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        highest, factor, w = _weigh(highest, lse, tl.max(lse, 0))
        weight = weight * factor + tl.sum(w, 0)
        total = total * factor + tl.sum(part * w[:, None], 0)
    return total, weight, highest


@triton.jit(do_not_specialize=["used", "slots", "kv_heads", "group", "q_len"])
def merge_slots(
    parts,
    more,
    more_lse,
    sinks,
    out,
    lse_out,
    used,
    slots,
    kv_heads,
    group,
    q_len,
    out_batch,
    out_head,
    out_group,
    out_token,
    DIM: tl.constexpr,
    MORE: tl.constexpr,
    SINKS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Merge the first `used` partials of one query row by LSE; see `attend_tile`.

    Grid: (batch * kv_heads * rows,). One partial more may come from elsewhere: contiguous
    `more[batch, kv_heads, rows, DIM]` and `more_lse[batch, kv_heads, rows]`, float32. Writes `out`
    by its strides, in its dtype, and if asked for `lse_out[batch, kv_heads, rows]`.
    """
    place = tl.program_id(0)
    all_rows = tl.num_programs(0).to(tl.int64)
    lses = parts + slots * all_rows * DIM
    row = place % (group * q_len)
    head = (place // (group * q_len)) % kv_heads
    batch = (place // (group * q_len * kv_heads)).to(tl.int64)
    dims = tl.arange(0, BLOCK_DIM)
    real_dims = dims < DIM
    total, weight, highest = merge_row(
        parts, lses, place, all_rows, used, DIM, BLOCK_SLOTS, BLOCK_DIM
    )
    if MORE:
        lse = tl.load(more_lse + place)
        part = tl.load(more + place.to(tl.int64) * DIM + dims, mask=real_dims, other=0.0)
        highest, factor, w = _weigh(highest, lse, lse)
        weight = weight * factor + w
        total = total * factor + part * w
    if SINKS:
        sink = tl.load(sinks + head * group + row // q_len).to(tl.float32)
        highest, factor, w = _weigh(highest, sink, sink)
        weight = weight * factor + w
        total = total * factor
    result = total / tl.where(weight == 0.0, 1.0, weight)
    out += batch * out_batch + head.to(tl.int64) * out_head
    out += (row // q_len) * out_group + (row % q_len) * out_token
    tl.store(out + dims, result.to(out.dtype.element_ty), mask=real_dims)
    if WITH_LSE:
        tl.store(lse_out + place, _lse_of(weight, highest))


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
    highest, _factor, weight = _weigh(lse, lse, lse)
    total = total * weight[:, None]
    if SECOND:
        start = batch * second_batch + head * second_head + member * second_group
        part = second + start + tokens[:, None] * second_token + dims[None, :]
        lse = tl.load(second_lse + places, mask=real, other=float("-inf"))
        highest, factor, w = _weigh(highest, lse, lse)
        weight = weight * factor + w
        total = total * factor[:, None]
        total += tl.load(part, mask=both, other=0.0).to(tl.float32) * w[:, None]
    if SINKS:
        sink = tl.load(sinks + head * group + member).to(tl.float32)
        highest, factor, w = _weigh(highest, sink, sink)
        weight = weight * factor + w
        total = total * factor[:, None]
    total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]

    start = batch * out_batch + head * out_head + member * out_group
    place_out = out + start + tokens[:, None] * out_token + dims[None, :]
    tl.store(place_out, total.to(out.dtype.element_ty), mask=both)
    if WITH_LSE:
        tl.store(out_lse + places, _lse_of(weight, highest), mask=real)
