"""The Triton programs of `fused_decode`; imports Triton, which not every system has.

Scores are kept in base 2 within a program (`exp2` is one instruction), natural outside.
"""

import triton
import triton.language as tl

from headinfer.attend.triton_merge import merge_row

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend_split(
    query,
    keys,
    values,
    mask,
    new_key,
    new_value,
    scale,
    first,
    end,
    newest,
    query_rows,
    token_stride,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
    WITH_NEW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Attend the query rows of one KV head to its tokens from `first` to before `end`.

    `WITH_NEW`, token `newest` is not read: it has `new_key` and `new_value`, `[DIM]`.

    Returns:
        The output `[BLOCK_ROWS, BLOCK_DIM]`, 0 where nothing is visible, and its LSE.
    """
    rows = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    real_dims = dims < DIM
    both = (rows < query_rows)[:, None] & real_dims[None, :]
    q = tl.load(query + rows[:, None] * DIM + dims[None, :], mask=both, other=0.0)
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for start in range(first, end, BLOCK_TOKENS):
        tokens = start + tl.arange(0, BLOCK_TOKENS)
        real_tokens = tokens < end
        stored = real_tokens
        if WITH_NEW:
            stored = stored & (tokens != newest)
        tile = stored[:, None] & real_dims[None, :]
        places = tokens[:, None] * token_stride + dims[None, :]
        k = tl.load(keys + places, mask=tile, other=0.0)
        v = tl.load(values + places, mask=tile, other=0.0)
        if WITH_NEW:
            is_new = (tokens == newest)[:, None]
            k = tl.where(is_new, new_key[None, :], k)
            v = tl.where(is_new, new_value[None, :], v)
        visible = real_tokens
        if MASKED:
            seen = tl.load(mask + tokens, mask=real_tokens, other=0)
            visible = visible & (seen != 0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2_E)
        scores = tl.where(visible[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # Where nothing was visible so far, 0 in place of -inf keeps -inf - -inf out.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        shrink = tl.exp2(highest - base)
        p = tl.exp2(scores - base[:, None])
        weight = weight * shrink + tl.sum(p, 1)
        total = total * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        highest = new_highest
    nothing = weight == 0.0
    result = total / tl.where(nothing, 1.0, weight)[:, None]
    lse = tl.where(nothing, float("-inf"), (highest + tl.log2(weight)) / _LOG2_E)
    return result, lse


@triton.jit(
    do_not_specialize=["kv_len", "split_tokens", "first_slot", "kv_heads", "query_rows", "slots"]
)
def attend_tile(
    query,
    keys,
    values,
    mask,
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Attend all query rows of one KV head to `split_tokens` tokens of a tile.

    Grid: (splits, batch * kv_heads). Reads a contiguous `query[batch, kv_heads, query_rows, DIM]`,
    keys and values `[batch, kv_heads, kv_len, DIM]` of the strides given, which begin `start`
    elements behind the pointers, and a contiguous `mask[batch, kv_len]`. Split `s` writes slot
    `first_slot + s` of `parts[slots, batch, kv_heads, query_rows, DIM]`, float32, and of the LSE
    that lie behind them, `[slots, batch, kv_heads, query_rows]`.
    """
    split = tl.program_id(0)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    rows = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    real_rows = rows < query_rows
    offset = start + batch * batch_stride + head * head_stride
    first = split.to(tl.int64) * split_tokens
    result, lse = _attend_split(
        query + tl.program_id(1) * (query_rows * DIM),
        keys + offset,
        values + offset,
        mask + batch * kv_len,
        0.0,
        0.0,
        scale,
        first,
        tl.minimum(first + split_tokens, kv_len),
        -1,
        query_rows,
        token_stride,
        DIM,
        MASKED,
        False,
        BLOCK_ROWS,
        BLOCK_DIM,
        BLOCK_TOKENS,
    )
    slot = (first_slot + split).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    place = slot * query_rows + rows
    lses = parts + slots * tl.num_programs(1).to(tl.int64) * (query_rows * DIM)
    both = real_rows[:, None] & (dims < DIM)[None, :]
    tl.store(parts + place[:, None] * DIM + dims[None, :], result, mask=both)
    tl.store(lses + place, lse, mask=real_rows)


@triton.jit(do_not_specialize=["kv_len", "split_tokens", "kv_heads", "query_rows"])
def decode_token(
    query,
    new_keys,
    new_values,
    keys,
    values,
    parts,
    arrived,
    out,
    scale,
    kv_len,
    split_tokens,
    kv_heads,
    query_rows,
    new_batch_stride,
    new_head_stride,
    start,
    batch_stride,
    head_stride,
    token_stride,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
):
    """Attend all query rows of one KV head to all its tokens, and put the newest in its place.

    Grid: (splits, batch * kv_heads); keys and values lie as in `attend_tile`, and `parts` has a
    slot for each split. The last token is written from `new_keys` and `new_values[batch, kv_heads,
    DIM]`. The last program of each head merges, and writes the contiguous `out[batch, kv_heads,
    query_rows, DIM]`. `arrived[batch * kv_heads]` counts programs, 0 before and after.
    """
    split = tl.program_id(0)
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    head = (tl.program_id(1) % kv_heads).to(tl.int64)
    rows = tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    real_rows = rows < query_rows
    real_dims = dims < DIM
    both = real_rows[:, None] & real_dims[None, :]
    offset = start + batch * batch_stride + head * head_stride
    new_offset = batch * new_batch_stride + head * new_head_stride
    new_key = tl.load(new_keys + new_offset + dims, mask=real_dims, other=0.0)
    new_value = tl.load(new_values + new_offset + dims, mask=real_dims, other=0.0)
    first = split.to(tl.int64) * split_tokens
    end = tl.minimum(first + split_tokens, kv_len)
    result, lse = _attend_split(
        query + tl.program_id(1) * (query_rows * DIM),
        keys + offset,
        values + offset,
        query,
        new_key,
        new_value,
        scale,
        first,
        end,
        kv_len - 1,
        query_rows,
        token_stride,
        DIM,
        False,
        True,
        BLOCK_ROWS,
        BLOCK_DIM,
        BLOCK_TOKENS,
    )
    if end == kv_len:
        newest = offset + (end - 1) * token_stride + dims
        tl.store(keys + newest, new_key, mask=real_dims)
        tl.store(values + newest, new_value, mask=real_dims)

    all_rows = tl.num_programs(1).to(tl.int64) * query_rows
    lses = parts + tl.num_programs(0) * all_rows * DIM
    first_row = tl.program_id(1).to(tl.int64) * query_rows
    place = split * all_rows + first_row + rows
    tl.store(parts + place[:, None] * DIM + dims[None, :], result, mask=both)
    tl.store(lses + place, lse, mask=real_rows)
    tl.debug_barrier()  # all threads have stored before one of them counts
    before = tl.atomic_add(arrived + tl.program_id(1), 1, sem="acq_rel")
    if before == tl.num_programs(0) - 1:
        for row in range(0, query_rows):
            total, weight, _highest = merge_row(
                parts,
                lses,
                first_row + row,
                all_rows,
                tl.num_programs(0),
                DIM,
                BLOCK_SLOTS,
                BLOCK_DIM,
            )
            place_out = out + (first_row + row) * DIM + dims
            tl.store(place_out, (total / weight).to(out.dtype.element_ty), mask=real_dims)
        tl.atomic_xchg(arrived + tl.program_id(1), 0)
