"""What the Triton programs of all forms of pages share; imports Triton, which not every system has.

Pages are found by the same strides in each form, and kept as they are by one program.
"""

import triton
import triton.language as tl

_PAGE_TOKENS = tl.constexpr(64)


@triton.jit
def place_of(memory, row, heads, at, batch_stride, head_stride, stride):
    """Return where the page or token `at` lies, of a row of `[batch * heads]` (int64)."""
    return (
        memory + row // heads * batch_stride + row % heads * head_stride + at.to(tl.int64) * stride
    )


@triton.jit(do_not_specialize=["tokens", "heads", "slot_bytes"])
def keep_raw_pages(
    values,
    pages,
    raw,
    taken,
    tokens,
    heads,
    slot_bytes,
    value_batch,
    value_head,
    value_token,
    page_batch,
    page_head,
    page_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    FLAG_AT: tl.constexpr,
    FLAG_MASK: tl.constexpr,
    FLAG: tl.constexpr,
    ADDRESS_AT: tl.constexpr,
):
    """Copy a page's values as they are into the next slot, and write its address, if it is flagged.

    Grid: (pages, batch * heads). Reads values `[batch, heads, tokens, DIM]`, writes into pages
    `[batch, heads, pages, page_bytes]` of uint8, with the strides given. Slots are `raw[slots,
    slot_bytes]` of uint8, of which `taken[1]` of int64 are taken. The constants behind `BLOCK` are
    those of a `RawFlag`.
    """
    page = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    target = place_of(pages, row, heads, page, page_batch, page_head, page_stride)
    flag = tl.load((target + FLAG_AT).to(tl.pointer_type(tl.uint16))).to(tl.int32)
    if (flag & FLAG_MASK) == FLAG:
        first = page * _PAGE_TOKENS
        source = place_of(values, row, heads, first, value_batch, value_head, value_token)
        slot = raw + tl.atomic_add(taken, 1) * slot_bytes
        to = slot.to(tl.pointer_type(values.dtype.element_ty))
        for at in range(0, _PAGE_TOKENS * DIM, BLOCK):
            places = at + tl.arange(0, BLOCK)
            token = places // DIM
            there = token < tokens - first
            kept = tl.load(source + token * value_token + places % DIM, mask=there, other=0)
            tl.store(to + places, kept)
        address = (target + ADDRESS_AT).to(tl.pointer_type(tl.int64))
        tl.store(address, slot.to(tl.int64))
