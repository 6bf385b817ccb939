"""The Triton programs of `fused`; imports Triton, which not every system has.

Values are handled as bits, in int16. A page's two halves are streams of their own (see `layout`).
So codes are read once for both, and all is read and written in wide pieces.
"""

import triton
import triton.language as tl

from headinfer.packed.triton_raw import place_of

_PAGE_TOKENS = tl.constexpr(64)
_WINDOW = tl.constexpr(14)
_ESCAPE = tl.constexpr(15)
_HEADER_BYTES = tl.constexpr(8)


@triton.jit
def _value_places(places, token_stride, DIM: tl.constexpr):
    """Return where values lie whose places in a page are given, from its first token on."""
    return places // DIM * token_stride + places % DIM


@triton.jit
def _code_of(exponents, base):
    codes = exponents - base
    inside = (codes >= 1) & (codes <= _WINDOW)
    return tl.where(exponents == 0, 0, tl.where(inside, codes, _ESCAPE))


@triton.jit
def _bits_of(kept, codes, base):
    """Return values from signs and mantissas, and their codes."""
    kept = kept.to(tl.int32)
    exponents = tl.where(codes == 0, 0, base + codes) & 0xFF
    return ((kept & 0x80) << 8 | exponents << 7 | (kept & 0x7F)).to(tl.int16)


@triton.jit(do_not_specialize=["tokens", "first", "heads"])
def unpack_pages(
    pages,
    values,
    counted,
    tokens,
    first,
    heads,
    page_batch,
    page_head,
    page_stride,
    value_batch,
    value_head,
    value_token,
    DIM: tl.constexpr,
    MAX_ESCAPES: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ESCAPES: tl.constexpr,
):
    """Unpack `BLOCK` values of each half of a page.

    Grid: (pages * parts, batch * heads). Reads pages `[batch, heads, pages, page_bytes]` of uint8,
    writes values `[batch, heads, tokens, DIM]`, with the strides given. Pages that have none of the
    tokens from `first` on are left alone. With `COUNTED` there are only so many from there on.
    """
    half: tl.constexpr = 32 * DIM
    header: tl.constexpr = 3 * half
    parts: tl.constexpr = half // BLOCK
    page = tl.program_id(0) // parts
    at = tl.program_id(0) % parts * BLOCK
    row = tl.program_id(1).to(tl.int64)
    limit = tokens
    if COUNTED:
        limit = tl.minimum(limit, first + tl.load(counted)).to(tl.int32)
    first_token = page * _PAGE_TOKENS
    if (first_token < limit) & (first_token + _PAGE_TOKENS > first):
        source = place_of(pages, row, heads, page, page_batch, page_head, page_stride)
        target = place_of(values, row, heads, first_token, value_batch, value_head, value_token)
        low = at + tl.arange(0, BLOCK)
        high = half + low
        to_low = target + _value_places(low, value_token, DIM)
        to_high = target + _value_places(high, value_token, DIM)
        left = limit - first_token
        there_low = low // DIM < left
        there_high = high // DIM < left
        listed = source + header + _HEADER_BYTES
        if tl.load(source + header + 3) != 0:
            address = tl.load(listed.to(tl.pointer_type(tl.int64)))
            raw = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16)
            tl.store(to_low, tl.load(raw + low), mask=there_low)
            tl.store(to_high, tl.load(raw + high), mask=there_high)
        else:
            base = tl.load(source + header + 2).to(tl.int32)
            codes = tl.load(source + 2 * half + low).to(tl.int32)
            bits = _bits_of(tl.load(source + low), codes & 0xF, base)
            tl.store(to_low, bits, mask=there_low)
            bits = _bits_of(tl.load(source + high), codes >> 4, base)
            tl.store(to_high, bits, mask=there_high)
            count = tl.load((source + header).to(tl.pointer_type(tl.int16)))
            if count > 0:
                tl.debug_barrier()  # threads write values anew that others wrote
                slots = tl.arange(0, BLOCK_ESCAPES)
                used = slots < count
                listed_places = listed.to(tl.pointer_type(tl.uint16)) + slots
                places = tl.load(listed_places, mask=used, other=0).to(tl.int32)
                own = used & (places % half >= at) & (places % half < at + BLOCK)
                own = own & (places // DIM < left)
                exponents = tl.load(listed + 2 * MAX_ESCAPES + slots, mask=own, other=0)
                kept = tl.load(source + places, mask=own, other=0)
                escaped = _bits_of(kept, exponents.to(tl.int32), 0)
                tl.store(target + _value_places(places, value_token, DIM), escaped, mask=own)


@triton.jit
def _load_bits(source, places, left, value_token, DIM: tl.constexpr):
    """Return values as they lie in memory, zeros where no token is, as int32 from 0 on."""
    there = places // DIM < left
    bits = tl.load(source + _value_places(places, value_token, DIM), mask=there, other=0)
    return bits.to(tl.int32) & 0xFFFF


@triton.jit
def _count_exponents(source, first, left, value_token, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Return how often each exponent comes in half a page, from place `first` on."""
    counts = tl.zeros([256], tl.int32)
    for at in range(first, first + 32 * DIM, BLOCK):
        places = at + tl.arange(0, BLOCK)
        bits = _load_bits(source, places, left, value_token, DIM)
        counts += tl.histogram(bits >> 7 & 0xFF, 256)
    return counts


@triton.jit
def _inside(counts):
    """Return for each base how many exponents have codes, without those that are 0."""
    up_to = tl.cumsum(counts, 0)
    bases = tl.arange(0, 256)
    inside = tl.gather(up_to, tl.minimum(bases + _WINDOW, 255), 0) - up_to
    return tl.where(bases + _WINDOW > 255, -1, inside)


@triton.jit
def _escapes_of(counts, inside, base, DIM: tl.constexpr):
    """Return how many exponents of half a page have no code."""
    bases = tl.arange(0, 256)
    coded = tl.where(bases == 0, counts, 0) + tl.where(bases == base, inside, 0)
    return 32 * DIM - tl.sum(coded, 0)


@triton.jit
def _store_half(
    source,
    target,
    places,
    left,
    value_token,
    base,
    listed,
    lists,
    DIM: tl.constexpr,
    MAX_ESCAPES: tl.constexpr,
):
    """Store signs and mantissas of some values, and list those that escape behind `listed` others.

    Returns:
        Their codes, and how many are listed with them.
    """
    bits = _load_bits(source, places, left, value_token, DIM)
    tl.store(target + places, (bits >> 8 & 0x80 | bits & 0x7F).to(tl.uint8))
    exponents = bits >> 7 & 0xFF
    codes = _code_of(exponents, base)
    escaped = (codes == _ESCAPE).to(tl.int32)
    slots = listed + tl.cumsum(escaped, 0) - 1
    lists = lists & (escaped != 0)
    header = target + 96 * DIM + _HEADER_BYTES
    tl.store(header.to(tl.pointer_type(tl.int16)) + slots, places.to(tl.int16), mask=lists)
    tl.store(header + 2 * MAX_ESCAPES + slots, exponents.to(tl.uint8), mask=lists)
    return codes, listed + tl.sum(escaped, 0)


@triton.jit(do_not_specialize=["tokens", "heads"])
def pack_pages(
    values,
    pages,
    tokens,
    heads,
    value_batch,
    value_head,
    value_token,
    page_batch,
    page_head,
    page_stride,
    DIM: tl.constexpr,
    MAX_ESCAPES: tl.constexpr,
    AREA: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_AREA: tl.constexpr,
):
    """Pack one page, whose values behind the last token are zeros.

    Grid: (pages, batch * heads). Reads values `[batch, heads, tokens, DIM]`, writes pages `[batch,
    heads, pages, page_bytes]` of uint8, with the strides given.
    """
    half: tl.constexpr = 32 * DIM
    page = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    first_token = page * _PAGE_TOKENS
    source = place_of(values, row, heads, first_token, value_batch, value_head, value_token)
    target = place_of(pages, row, heads, page, page_batch, page_head, page_stride)
    left = tokens - first_token
    low_counts = _count_exponents(source, 0, left, value_token, DIM, BLOCK)
    high_counts = _count_exponents(source, half, left, value_token, DIM, BLOCK)
    low_inside = _inside(low_counts)
    high_inside = _inside(high_counts)
    inside = low_inside + high_inside
    base = tl.min(tl.where(inside == tl.max(inside, 0), tl.arange(0, 256), 256), 0)
    low_listed = 0
    high_listed = _escapes_of(low_counts, low_inside, base, DIM)
    count = high_listed + _escapes_of(high_counts, high_inside, base, DIM)
    lists = count <= MAX_ESCAPES
    area = tl.arange(0, BLOCK_AREA)
    header = tl.where(area == 0, tl.where(lists, count & 0xFF, 0), 0)
    header = tl.where(area == 1, tl.where(lists, count >> 8, 0), header)
    header = tl.where(area == 2, base, header)
    header = tl.where(area == 3, tl.where(lists, 0, 1), header)
    tl.store(target + 3 * half + area, header.to(tl.uint8), mask=area < AREA)
    tl.debug_barrier()  # threads list escapes where others cleared
    for at in range(0, half, BLOCK):
        places = at + tl.arange(0, BLOCK)
        low, low_listed = _store_half(
            source,
            target,
            places,
            left,
            value_token,
            base,
            low_listed,
            lists,
            DIM,
            MAX_ESCAPES,
        )
        high, high_listed = _store_half(
            source,
            target,
            half + places,
            left,
            value_token,
            base,
            high_listed,
            lists,
            DIM,
            MAX_ESCAPES,
        )
        tl.store(target + 2 * half + places, (low | high << 4).to(tl.uint8))
