"""The merge of partials by LSE on CUDA: programs, and what the others merge with.

Partials are merged in three places: here, in `partial` by torch, in `native/merge.h` by the C
kernels. There is no fourth. Imports Triton, which not every system has.
"""

import triton
import triton.language as tl


@triton.jit
def _rebase(highest, lse_highest):
    """Have sums of partials refer to the highest LSE so far.

    Every merge is this: sums of outputs and of weights, which refer to the LSE `highest`, are
    multiplied by the factor. New partials are added to both with the weight `exp(lse - base)`.

    Args:
        highest: -inf before the first.
        lse_highest: the highest LSE of the new partials.

    Returns:
        The LSE to which the sums refer from now on, the factor and the base.
    """
    new_highest = tl.maximum(highest, lse_highest)
    # Where nothing was visible so far, 0 in place of -inf keeps -inf - -inf out.
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    return new_highest, tl.exp(highest - base), base


@triton.jit
def _lse_of(weight, highest):
    """Return the LSE of a sum of weights; -inf where there are none."""
    nothing = weight == 0.0
    return tl.where(nothing, float("-inf"), highest + tl.log(tl.where(nothing, 1.0, weight)))


@triton.jit
def merge_rows(
    parts,
    lses,
    places,
    real_rows,
    all_rows,
    used,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Merge the first `used` partials of the query rows at `places[BLOCK_ROWS]`.

    Loads pass by the multiprocessor's own cache, which may hold what others have overwritten.

    Returns:
        The weighted sums of the outputs `[BLOCK_ROWS, BLOCK_DIM]`, their weights, and the LSE that
        both refer to.
    """
    dims = tl.arange(0, BLOCK_DIM)
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for start in range(0, used, BLOCK_SLOTS):
        numbers = start + tl.arange(0, BLOCK_SLOTS)
        real = real_rows[:, None] & (numbers < used)[None, :]
        slots = numbers.to(tl.int64)[None, :] * all_rows + places[:, None]
        lse = tl.load(lses + slots, mask=real, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            parts + slots[:, :, None] * DIM + dims[None, None, :],
            mask=real[:, :, None] & (dims < DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        highest, factor, base = _rebase(highest, tl.max(lse, 1))
        w = tl.exp(lse - base[:, None])
        weight = weight * factor + tl.sum(w, 1)
        total = total * factor[:, None] + tl.sum(part * w[:, :, None], 1)
    return total, weight, highest


@triton.jit
def merge_sinks(scores, total, weight, highest):
    """Merge attention sinks into what `merge_rows` returned: a key each whose value is zero.

    Args:
        scores: of the sinks, `[BLOCK_ROWS]` in float32.
        total: the weighted sums of the outputs.
        weight: of each sum.
        highest: the LSE that both refer to.
    """
    highest, factor, base = _rebase(highest, scores)
    return total * factor[:, None], weight * factor + tl.exp(scores - base), highest


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
    place = tl.program_id(0) + tl.arange(0, 1)
    all_rows = tl.num_programs(0).to(tl.int64)
    lses = parts + slots * all_rows * DIM
    row = place % (group * q_len)
    head = (place // (group * q_len)) % kv_heads
    batch = (place // (group * q_len * kv_heads)).to(tl.int64)
    dims = tl.arange(0, BLOCK_DIM)
    real_dims = (dims < DIM)[None, :]
    total, weight, highest = merge_rows(
        parts, lses, place, place >= 0, all_rows, used, DIM, 1, BLOCK_SLOTS, BLOCK_DIM
    )
    if MORE:
        lse = tl.load(more_lse + place)
        elements = place.to(tl.int64)[:, None] * DIM + dims[None, :]
        part = tl.load(more + elements, mask=real_dims, other=0.0)
        highest, factor, base = _rebase(highest, lse)
        w = tl.exp(lse - base)
        weight = weight * factor + w
        total = total * factor[:, None] + part * w[:, None]
    if SINKS:
        sink = tl.load(sinks + head * group + row // q_len).to(tl.float32)
        total, weight, highest = merge_sinks(sink, total, weight, highest)
    result = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    start = batch * out_batch + head.to(tl.int64) * out_head
    start += (row // q_len) * out_group + (row % q_len) * out_token
    result = result.to(out.dtype.element_ty)
    tl.store(out + start[:, None] + dims[None, :], result, mask=real_dims)
    if WITH_LSE:
        tl.store(lse_out + place, _lse_of(weight, highest))


@triton.jit
def _merge_block(total, weight, highest, parts, lses, places, tokens, token_stride, both, real):
    """Merge a block of a partial, of one query head, into sums as `_rebase` has them.

    Args:
        total: the weighted sums of the outputs, `[BLOCK_TOKENS, BLOCK_DIM]`.
        weight: of each sum.
        highest: the LSE that both refer to.
        parts: the first output of the head; elements are adjacent.
        lses: of all heads.
        places: of the LSE that are read.
        tokens: of the outputs that are read.
        token_stride: elements from token to token.
        both: which elements there are.
        real: which tokens there are.

    Returns:
        The sums, their weights, and the LSE that both refer to.
    """
    dims = tl.arange(0, total.shape[1])
    lse = tl.load(lses + places, mask=real, other=float("-inf"))
    highest, factor, base = _rebase(highest, lse)
    w = tl.exp(lse - base)
    part = tl.load(parts + tokens[:, None] * token_stride + dims[None, :], mask=both, other=0.0)
    total = total * factor[:, None] + part.to(tl.float32) * w[:, None]
    return total, weight * factor + w, highest


@triton.jit(do_not_specialize=["partials", "kv_heads", "group", "q_len"])
def merge_few(
    first,
    first_lse,
    second,
    second_lse,
    third,
    third_lse,
    fourth,
    fourth_lse,
    sinks,
    out,
    out_lse,
    partials,
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
    third_batch,
    third_head,
    third_group,
    third_token,
    fourth_batch,
    fourth_head,
    fourth_group,
    fourth_token,
    out_batch,
    out_head,
    out_group,
    out_token,
    DIM: tl.constexpr,
    SINKS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Merge the first ones of four partials, and attention sinks, by LSE.

    Grid: (blocks of tokens, batch * kv_heads * group). Outputs `[batch, kv_heads, group, q_len,
    DIM]` are read and written by their strides; `out`, in its dtype, may be `first`. LSE are
    contiguous, `[batch, kv_heads, group, q_len]`, as is `sinks[kv_heads, group]`; `out_lse` is
    memory of its own. What lies behind the first `partials` is not read.
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

    highest = tl.full([BLOCK_TOKENS], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_TOKENS], tl.float32)
    total = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
    first += batch * first_batch + head * first_head + member * first_group
    total, weight, highest = _merge_block(
        total, weight, highest, first, first_lse, places, tokens, first_token, both, real
    )
    if partials > 1:
        second += batch * second_batch + head * second_head + member * second_group
        total, weight, highest = _merge_block(
            total, weight, highest, second, second_lse, places, tokens, second_token, both, real
        )
    if partials > 2:
        third += batch * third_batch + head * third_head + member * third_group
        total, weight, highest = _merge_block(
            total, weight, highest, third, third_lse, places, tokens, third_token, both, real
        )
    if partials > 3:
        fourth += batch * fourth_batch + head * fourth_head + member * fourth_group
        total, weight, highest = _merge_block(
            total, weight, highest, fourth, fourth_lse, places, tokens, fourth_token, both, real
        )
    if SINKS:
        scores = tl.load(sinks + head * group + member).to(tl.float32)
        total, weight, highest = merge_sinks(scores, total, weight, highest)
    total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]

    start = batch * out_batch + head * out_head + member * out_group
    place_out = out + start + tokens[:, None] * out_token + dims[None, :]
    tl.store(place_out, total.to(out.dtype.element_ty), mask=both)
    if WITH_LSE:
        tl.store(out_lse + places, _lse_of(weight, highest), mask=real)
