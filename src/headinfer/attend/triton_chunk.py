"""The Triton program of `fused_chunk`; imports Triton, which not every system has.

Scores are kept in base 2 within it, natural outside.
"""

import triton
import triton.language as tl

from headinfer.attend.triton_kernels import scores_in_base_2

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _attend_block(
    q,
    keys,
    values,
    mask,
    places,
    rows,
    real_rows,
    scale,
    left,
    shift,
    window_tokens,
    mask_query,
    highest,
    weight,
    total,
    EDGE: tl.constexpr,
    DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Add the attention of some query rows to one block of tokens; return the three sums anew.

    Without `EDGE` every row sees every token of the block. With it `left` tokens are there, and
    row `rows[i]` sees those up to `rows[i] + shift`, counted from the block's first.
    """
    tokens = tl.arange(0, BLOCK_TOKENS)
    real_dims = (tl.arange(0, BLOCK_DIM) < DIM)[None, :]
    if EDGE:
        tile = (tokens < left)[:, None] & real_dims
        k = tl.load(keys + places, mask=tile, other=0.0)
        v = tl.load(values + places, mask=tile, other=0.0)
    elif DIM == BLOCK_DIM:
        k = tl.load(keys + places)
        v = tl.load(values + places)
    else:
        k = tl.load(keys + places, mask=real_dims, other=0.0)
        v = tl.load(values + places, mask=real_dims, other=0.0)
    products = tl.dot(q, tl.trans(k), input_precision="ieee")
    scores = scores_in_base_2(products, scale, CAP)
    if EDGE:
        visible = (tokens < left)[None, :] & real_rows[:, None]
        if CAUSAL:
            newest = (rows + shift)[:, None]
            visible = visible & (tokens[None, :] <= newest)
            if WINDOW:
                visible = visible & (tokens[None, :] > newest - window_tokens)
        if MASKED:
            at = rows.to(tl.int64)[:, None] * mask_query + tokens[None, :]
            visible = visible & (tl.load(mask + at, mask=visible, other=0) != 0)
        scores = tl.where(visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    base = new_highest
    if EDGE:  # where nothing was visible so far, 0 in place of -inf keeps -inf - -inf out
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    shrink = tl.exp2(highest - base)
    p = tl.exp2(scores - base[:, None])
    weight = weight * shrink + tl.sum(p, 1)
    total = total * shrink[:, None]
    total += tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return new_highest, weight, total


@triton.jit(
    do_not_specialize=[
        *("kv_heads", "group", "q_len", "kv_len", "split_tokens", "past_tokens", "window_tokens"),
    ]
)
def attend_chunk(
    query,
    keys,
    values,
    mask,
    out,
    lses,
    scale,
    kv_heads,
    group,
    q_len,
    kv_len,
    split_tokens,
    past_tokens,
    window_tokens,
    query_batch,
    query_head,
    query_group,
    query_token,
    start,
    batch_stride,
    head_stride,
    token_stride,
    mask_batch,
    mask_query,
    DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """Attend `BLOCK_ROWS` queries of one query head to `split_tokens` tokens.

    Grid: (blocks of queries, batch * kv_heads * group, splits). Reads `query[batch, kv_heads,
    group, q_len, DIM]` by its strides. Keys and values `[batch, kv_heads, kv_len, DIM]` begin
    `start` elements behind the pointers. With `CAUSAL` query `i` sees tokens up to `i +
    past_tokens`, with `WINDOW` only so many of them. With `MASKED` it sees those that `mask[batch,
    q_len, kv_len]` shows, whose strides may be 0. Scores are bounded by `CAP`, unless it is 0.

    Writes `out[splits, batch, kv_heads, group, q_len, DIM]` in its dtype, contiguous, 0 where
    nothing is visible, and the LSE `lses[splits, batch, kv_heads, group, q_len]`.
    """
    block = tl.program_id(0)
    if CAUSAL:  # the blocks that see most come first, so that none of these is left for the end
        block = tl.num_programs(0) - 1 - block
    head_row = tl.program_id(1)
    member = (head_row % group).to(tl.int64)
    head = ((head_row // group) % kv_heads).to(tl.int64)
    batch = (head_row // (group * kv_heads)).to(tl.int64)
    first_row = block * BLOCK_ROWS
    rows = first_row + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    real_rows = rows < q_len
    both = real_rows[:, None] & (dims < DIM)[None, :]
    query += batch * query_batch + head * query_head + member * query_group
    places = rows.to(tl.int64)[:, None] * query_token + dims[None, :]
    q = tl.load(query + places, mask=both, other=0.0)
    first = tl.program_id(2).to(tl.int64) * split_tokens
    end = tl.minimum(first + split_tokens, kv_len)
    full_end = first + (end - first) // BLOCK_TOKENS * BLOCK_TOKENS
    if CAUSAL:
        end = tl.minimum(end, past_tokens + tl.minimum(first_row + BLOCK_ROWS, q_len))
        seen_by_all = tl.maximum(tl.minimum(past_tokens + first_row + 1, end) - first, 0)
        full_end = first + seen_by_all // BLOCK_TOKENS * BLOCK_TOKENS
    if WINDOW:
        first = tl.maximum(first, past_tokens + first_row + 1 - window_tokens)
    if WINDOW or MASKED:
        full_end = first
    keys += start + batch * batch_stride + head * head_stride
    values += start + batch * batch_stride + head * head_stride
    mask += batch * mask_batch
    places = tl.arange(0, BLOCK_TOKENS)[:, None] * token_stride + dims[None, :]
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_ROWS], tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    for at in range(first, full_end, BLOCK_TOKENS):
        highest, weight, total = _attend_block(
            q,
            keys + at * token_stride,
            values + at * token_stride,
            mask,
            places,
            rows,
            real_rows,
            scale,
            BLOCK_TOKENS,
            0,
            0,
            0,
            highest,
            weight,
            total,
            False,
            DIM,
            CAUSAL,
            WINDOW,
            MASKED,
            CAP,
            BLOCK_ROWS,
            BLOCK_DIM,
            BLOCK_TOKENS,
        )
    for at in range(full_end, end, BLOCK_TOKENS):
        highest, weight, total = _attend_block(
            q,
            keys + at * token_stride,
            values + at * token_stride,
            mask + at,
            places,
            rows,
            real_rows,
            scale,
            (end - at).to(tl.int32),
            (past_tokens - at).to(tl.int32),
            window_tokens,
            mask_query,
            highest,
            weight,
            total,
            True,
            DIM,
            CAUSAL,
            WINDOW,
            MASKED,
            CAP,
            BLOCK_ROWS,
            BLOCK_DIM,
            BLOCK_TOKENS,
        )
    nothing = weight == 0.0
    weight = tl.where(nothing, 1.0, weight)
    result = total / weight[:, None]
    lse = tl.where(nothing, float("-inf"), (highest + tl.log2(weight)) / _LOG2_E)
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + head_row
    places = row * q_len + rows
    result = result.to(out.dtype.element_ty)
    tl.store(out + places[:, None] * DIM + dims[None, :], result, mask=both)
    tl.store(lses + places, lse, mask=real_rows)
