"""The Triton programs of `fused_decode`; imports Triton, which not every system has.

Scores are kept in base 2 within a program (`exp2` is one instruction), natural outside.
"""

import triton
import triton.language as tl

from headinfer.attend.triton_merge import merge_rows, merge_sinks

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def scores_in_base_2(products, scale, CAP: tl.constexpr):
    """Return the scores of some products of queries and keys, in base 2.

    They are bounded by `CAP * tanh(score / CAP)`, which 0 leaves out. The hyperbolic tangent of x
    is `1 - 2 / (exp(2 x) + 1)`: two instructions of the unit for such functions, and right to the
    last bit of 1. So a bounded score is off by that times the cap, as one in float32 may be.
    """
    if CAP == 0.0:
        scores = products * (scale * _LOG2_E)
    else:
        powers = tl.exp2(products * (scale * (2.0 * _LOG2_E / CAP)))
        scores = CAP * _LOG2_E - (2.0 * CAP * _LOG2_E) / (powers + 1.0)
    return scores


@triton.jit
def _attend_split(
    q,
    keys,
    values,
    mask,
    scale,
    first,
    end,
    token_stride,
    sink_tokens,
    gap,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
    APART: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Attend the query rows `q[BLOCK_ROWS, BLOCK_DIM]` of a KV head to tokens `first` to `end`.

    With `APART` those from `sink_tokens` on lie `gap` places further behind.

    Returns:
        For each row its highest score in base 2, the weights that refer to that score,
        and the values with these weights, `[BLOCK_ROWS, BLOCK_DIM]`.
    """
    dims = tl.arange(0, BLOCK_DIM)
    real_dims = dims < DIM
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for start in range(first, end, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        real_tokens = tokens < end
        tile = real_tokens[:, None] & real_dims[None, :]
        at = tokens
        if APART:
            at += tl.where(tokens >= sink_tokens, gap, 0)
        places = at[:, None] * token_stride + dims[None, :]
        # What is loaded goes to the product as it is: whatever touched it would take a detour.
        k = tl.load(keys + places, mask=tile, other=0.0)
        v = tl.load(values + places, mask=tile, other=0.0)
        visible = real_tokens
        if MASKED:
            seen = tl.load(mask + tokens, mask=real_tokens, other=0)
            visible = visible & (seen != 0)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = scores_in_base_2(products, scale, CAP)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # Where nothing was visible so far, 0 in place of -inf keeps -inf - -inf out.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shrink = tl.exp2(highest - base)
        p = tl.exp2(scores - base[:, None])
        weight = weight * shrink + tl.sum(p, 1)
        total = total * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        highest = new_highest
    return highest, weight, total


@triton.jit
def _store_part(
    highest, weight, total, outs, lses, place, real_rows, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Store what `_attend_split` returned as an output, 0 where nothing is visible, and its LSE."""
    dims = tl.arange(0, BLOCK_DIM)
    nothing = weight == 0.0
    result = total / tl.where(nothing, 1.0, weight)[:, None]
    lse = tl.where(nothing, float("-inf"), (highest + tl.log2(weight)) / _LOG2_E)
    both = real_rows[:, None] & (dims < DIM)[None, :]
    tl.store(outs + place[:, None] * DIM + dims[None, :], result, mask=both)
    tl.store(lses + place, lse, mask=real_rows)


@triton.jit(
    do_not_specialize=["kv_len", "split_tokens", "first_slot", "kv_heads", "query_rows", "slots"]
)
def attend_tile(
    query,
    keys,
    values,
    mask,
    counted,
    parts,
    scale,
    kv_len,
    split_tokens,
    first_slot,
    kv_heads,
    query_rows,
    slots,
    start,
    batch_stride,
    head_stride,
    token_stride,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
    COUNTED: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
):
    """Attend all query rows of one KV head to `split_tokens` tokens of a tile.

    Grid: (splits, batch * kv_heads). Reads a contiguous `query[batch, kv_heads, query_rows, DIM]`,
    keys and values `[batch, kv_heads, kv_len, DIM]` of the strides given, which begin `start`
    elements behind the pointers, and a contiguous `mask[batch, kv_len]`. Split `s` writes slot
    `first_slot + s` of `parts[slots, batch, kv_heads, query_rows, DIM]`, float32, and of the LSE
    that lie behind them, `[slots, batch, kv_heads, query_rows]`. With `COUNTED` the number of
    tokens is read from `counted[1]`, and divided as `slots.split` does; parts that are left are
    empty. Scores are bounded by `CAP`, unless it is 0.
    """
    split = tl.program_id(0)
    if COUNTED:
        kv_len = tl.load(counted).to(tl.int32)
        splits = tl.maximum(tl.minimum(tl.num_programs(0), kv_len // LEAST_SPLIT), 1)
        split_tokens = tl.cdiv(tl.cdiv(kv_len, BLOCK_TOKENS), splits) * BLOCK_TOKENS
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    rows = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    real_rows = rows < query_rows
    both = real_rows[:, None] & (dims < DIM)[None, :]
    query += tl.program_id(1) * (query_rows * DIM)
    offset = start + batch * batch_stride + head * head_stride
    first = split.to(tl.int64) * split_tokens
    highest, weight, total = _attend_split(
        tl.load(query + rows[:, None] * DIM + dims[None, :], mask=both, other=0.0),
        keys + offset,
        values + offset,
        mask + batch * kv_len,
        scale,
        first,
        tl.minimum(first + split_tokens, kv_len),
        token_stride,
        0,
        0,
        DIM,
        MASKED,
        False,
        CAP,
        BLOCK_ROWS,
        BLOCK_DIM,
        BLOCK_TOKENS,
    )
    slot = (first_slot + split).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    lses = parts + slots * tl.num_programs(1).to(tl.int64) * (query_rows * DIM)
    place = slot * query_rows + rows
    _store_part(highest, weight, total, parts, lses, place, real_rows, DIM, BLOCK_DIM)


@triton.jit(do_not_specialize=["kv_len", "most_splits", "kv_heads", "sink_tokens", "gap"])
def decode_token(
    query,
    new_keys,
    new_values,
    keys,
    values,
    parts,
    arrived,
    out,
    sinks,
    place,
    scale,
    kv_len,
    most_splits,
    kv_heads,
    sink_tokens,
    gap,
    new_batch_stride,
    new_head_stride,
    start,
    batch_stride,
    head_stride,
    token_stride,
    QUERY_ROWS: tl.constexpr,
    DIM: tl.constexpr,
    SINKS: tl.constexpr,
    PLACE: tl.constexpr,
    APART: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    LEAST_SPLIT: tl.constexpr,
):
    """Attend all query rows of one KV head to all its tokens, and put the newest in its place.

    Grid: (splits, batch * kv_heads). There are as many splits as `kv_len` takes, or `most_splits`,
    of which the rest return at once. Keys and values lie as in `attend_tile`. With `APART` the
    first `sink_tokens` of the `kv_len` tokens do, and the others `gap` places further behind.
    With `PLACE` it is read from `place[3]`, see `TokenWork.place`, so that a captured launch serves
    other lengths. `parts` has `most_splits` slots. The last token is written from `new_keys` and
    `new_values[batch, kv_heads, DIM]`. The last program of each head merges, also
    `sinks[kv_heads, QUERY_ROWS]`, and writes the contiguous `out`. That is `[batch, kv_heads,
    QUERY_ROWS, DIM]`. `arrived[batch * kv_heads]` counts programs, 0 before and after.
    """
    split = tl.program_id(0)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    if PLACE:
        kv_len = tl.load(place + 1).to(tl.int32)
        if APART:
            sink_tokens = tl.load(place + 2).to(tl.int32)
            gap = tl.load(place) - sink_tokens
            kv_len += sink_tokens
        else:
            start += tl.load(place) * token_stride
    # Tokens are divided into parts of whole blocks, whoever reckons: results repeat bit for bit.
    splits = tl.maximum(tl.minimum(most_splits, kv_len // LEAST_SPLIT), 1)
    split_tokens = tl.cdiv(tl.cdiv(kv_len, BLOCK_TOKENS), splits) * BLOCK_TOKENS
    used = tl.cdiv(kv_len, split_tokens)
    if split >= used:
        return
    rows = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    real_rows = rows < QUERY_ROWS
    real_dims = dims < DIM
    both = real_rows[:, None] & real_dims[None, :]
    query += tl.program_id(1) * (QUERY_ROWS * DIM)
    q = tl.load(query + rows[:, None] * DIM + dims[None, :], mask=both, other=0.0)
    offset = start + batch * batch_stride + head * head_stride
    first = split.to(tl.int64) * split_tokens
    highest, weight, total = _attend_split(
        q,
        keys + offset,
        values + offset,
        query,
        scale,
        first,
        tl.minimum(first + split_tokens, kv_len - 1),
        token_stride,
        sink_tokens,
        gap,
        DIM,
        False,
        APART,
        CAP,
        BLOCK_ROWS,
        BLOCK_DIM,
        BLOCK_TOKENS,
    )
    if split == used - 1:  # the new token, which is not read from its place, is the last
        new_offset = batch * new_batch_stride + head * new_head_stride + dims
        new_key = tl.load(new_keys + new_offset, mask=real_dims, other=0.0)
        new_value = tl.load(new_values + new_offset, mask=real_dims, other=0.0)
        newest = (kv_len - 1).to(tl.int64)
        if APART:
            newest += gap
        newest = offset + newest * token_stride + dims
        tl.store(keys + newest, new_key, mask=real_dims)
        tl.store(values + newest, new_value, mask=real_dims)
        product = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1)
        score = scores_in_base_2(product, scale, CAP)
        new_highest = tl.maximum(highest, score)
        shrink = tl.exp2(highest - new_highest)
        p = tl.exp2(score - new_highest)
        weight = weight * shrink + p
        total = total * shrink[:, None] + p[:, None] * new_value.to(tl.float32)[None, :]
        highest = new_highest

    all_rows = tl.num_programs(1).to(tl.int64) * QUERY_ROWS
    lses = parts + most_splits * all_rows * DIM
    first_row = tl.program_id(1).to(tl.int64) * QUERY_ROWS
    slot = split * all_rows + first_row + rows
    _store_part(highest, weight, total, parts, lses, slot, real_rows, DIM, BLOCK_DIM)
    tl.debug_barrier()  # all threads have stored before one of them counts
    before = tl.atomic_add(arrived + tl.program_id(1), 1, sem="acq_rel")
    if before == used - 1:
        member = tl.arange(0, MERGED_ROWS)
        real = member < QUERY_ROWS
        merged, merged_weight, lse = merge_rows(
            parts,
            lses,
            first_row + member,
            real,
            all_rows,
            used,
            DIM,
            MERGED_ROWS,
            BLOCK_SLOTS,
            BLOCK_DIM,
        )
        if SINKS:
            sink = tl.load(sinks + head * QUERY_ROWS + member, mask=real, other=float("-inf"))
            merged, merged_weight, lse = merge_sinks(
                sink.to(tl.float32), merged, merged_weight, lse
            )
        result = merged / tl.where(real, merged_weight, 1.0)[:, None]
        place_out = out + (first_row + member)[:, None] * DIM + dims[None, :]
        written = real[:, None] & real_dims[None, :]
        tl.store(place_out, result.to(out.dtype.element_ty), mask=written)
        tl.atomic_xchg(arrived + tl.program_id(1), 0)
