"""The Triton programs of `fused`; imports Triton, which not every system has."""

import triton
import triton.language as tl

from headinfer.packed.triton_raw import place_of

_PAGE_TOKENS = tl.constexpr(64)
_RAW_SCALE = tl.constexpr(0x7FC0)
_LEAST_SCALE_BITS = tl.constexpr(0x0080)
_SIGN = tl.constexpr(0x80)
_EXPONENTS_APART = tl.constexpr(960)  # 120 exponents, of 8 codes each: float32's and fp8's bias
_LEAST_NORMAL = tl.constexpr(0.015625)
_MOST_SUBNORMAL_ULP = tl.constexpr(16384.0)  # whose last bit is the least number of fp8


@triton.jit
def _number_of(codes, INT8: tl.constexpr):
    """Return the float32 that a byte stands for."""
    if INT8:
        return codes.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        bits = codes.to(tl.int16)
        half = (bits & 0x80) << 8 | (bits & 0x7F) << 7
        return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _code_of(numbers, INT8: tl.constexpr):
    """Return the byte nearest to a float32 that has been scaled."""
    if INT8:
        return tl.floor(numbers + 0.5).to(tl.int32).to(tl.uint8)
    else:
        bits = numbers.to(tl.int32, bitcast=True)
        magnitude = tl.abs(numbers)
        whole = magnitude.to(tl.int32, bitcast=True)
        normal = ((whole + 0x7FFFF + (whole >> 20 & 1)) >> 20) - _EXPONENTS_APART
        small = (magnitude + _MOST_SUBNORMAL_ULP).to(tl.int32, bitcast=True) & 0xF
        code = tl.where(magnitude < _LEAST_NORMAL, small, normal)
        return (bits >> 24 & _SIGN | code).to(tl.uint8)


@triton.jit
def _rounded(numbers, DTYPE: tl.constexpr):
    """Return finite numbers as the nearest of a dtype; the interpreter would cut bfloat16 off."""
    if tl.bfloat16 == DTYPE:
        bits = numbers.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return numbers.to(DTYPE)


@triton.jit
def _scale_bits(most, INT8: tl.constexpr):
    """Return the bits of a scale: what the largest magnitude needs, rounded up."""
    wanted = most * ((1.0 / 127) if INT8 else (1.0 / 448))
    bits = (wanted.to(tl.int32, bitcast=True) + 0xFFFF) >> 16
    return tl.where(bits < _LEAST_SCALE_BITS, 0, bits)


@triton.jit
def _scale_of(bits):
    return (bits << 16).to(tl.float32, bitcast=True)


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
    BLOCK_DIM: tl.constexpr,
    INT8: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Give `BLOCK` tokens of a page.

    Grid: (pages * 64 / BLOCK, batch * heads). Reads pages `[batch, heads, pages, page_bytes]` of
    uint8, writes values `[batch, heads, tokens, DIM]`, with the strides given. Pages that have none
    of the tokens from `first` on are left alone. With `COUNTED` there are only so many from there
    on.
    """
    parts: tl.constexpr = _PAGE_TOKENS // BLOCK
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
        token = at + tl.arange(0, BLOCK)
        element = tl.arange(0, BLOCK_DIM)
        inside = element < DIM
        places = token[:, None] * DIM + element[None, :]
        to = target + token[:, None] * value_token + element[None, :]
        there = (token < limit - first_token)[:, None] & inside[None, :]
        scales = (source + _PAGE_TOKENS * DIM).to(tl.pointer_type(tl.uint16))
        first_scale = tl.load(scales).to(tl.int32)
        if first_scale == _RAW_SCALE:
            address = tl.load(source.to(tl.pointer_type(tl.int64)))
            raw = address.to(tl.pointer_type(values.dtype.element_ty))
            raw = tl.multiple_of(raw, 16)
            tl.store(to, tl.load(raw + places, mask=there, other=0), mask=there)
        else:
            codes = tl.load(source + places, mask=there, other=0)
            if INT8:
                bits = tl.load(scales + element, mask=inside, other=0).to(tl.int32)
                numbers = _number_of(codes, INT8) * _scale_of(bits)[None, :]
            else:
                numbers = _number_of(codes, INT8) * _scale_of(first_scale)
            tl.store(to, _rounded(numbers, values.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["tokens", "heads", "largest_kept"])
def pack_pages(
    values,
    pages,
    tokens,
    heads,
    largest_kept,
    value_batch,
    value_head,
    value_token,
    page_batch,
    page_head,
    page_stride,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAGE_BYTES: tl.constexpr,
    INT8: tl.constexpr,
):
    """Round one page, unless it is not full or has values that it must keep as they are.

    Grid: (pages, batch * heads). Reads values `[batch, heads, tokens, DIM]`, writes pages `[batch,
    heads, pages, page_bytes]` of uint8, with the strides given. `largest_kept` is the largest
    magnitude of a page that is rounded.
    """
    page = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    first_token = page * _PAGE_TOKENS
    source = place_of(values, row, heads, first_token, value_batch, value_head, value_token)
    target = place_of(pages, row, heads, page, page_batch, page_head, page_stride)
    left = tokens - first_token
    token = tl.arange(0, _PAGE_TOKENS)
    element = tl.arange(0, BLOCK_DIM)
    inside = element < DIM
    there = (token < left)[:, None] & inside[None, :]
    from_ = source + token[:, None] * value_token + element[None, :]
    numbers = tl.load(from_, mask=there, other=0).to(tl.float32)
    magnitudes = tl.abs(numbers)
    beyond = tl.where(magnitudes <= largest_kept, 0, 1)  # NaN is beyond, too
    rounds = (left >= _PAGE_TOKENS) & (tl.sum(tl.sum(beyond, 1), 0) == 0)
    numbers = tl.where(rounds, numbers, 0.0)
    most = tl.max(tl.where(rounds, magnitudes, 0.0), 0)
    if INT8:
        bits = _scale_bits(most, INT8)
    else:
        bits = _scale_bits(tl.max(most, 0) + tl.zeros_like(most), INT8)
    scales = _scale_of(bits)
    divisors = tl.where(scales > 0, scales, float("inf"))
    codes = _code_of(tl.div_rn(numbers, divisors[None, :] + tl.zeros_like(numbers)), INT8)
    places = token[:, None] * DIM + element[None, :]
    tl.store(target + places, tl.where(rounds, codes, 0).to(tl.uint8), mask=inside[None, :])
    kept = tl.where(element == 0, _RAW_SCALE, 0)
    if not INT8:
        bits = tl.where(element == 0, bits, 0)
    bits = tl.where(rounds, bits, kept).to(tl.uint16)
    to = (target + _PAGE_TOKENS * DIM).to(tl.pointer_type(tl.uint16))
    tl.store(to + element, bits, mask=element < (PAGE_BYTES - _PAGE_TOKENS * DIM) // 2)
