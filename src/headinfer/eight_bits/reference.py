"""Rounding to 8 bits and back by torch's operations, on any device.

The kernels are compared with it, to the last bit of a page.
"""

import ctypes

import torch
import torch.nn.functional as F

from headinfer.eight_bits.layout import LEAST_SCALE_BITS, RAW_SCALE, Code, EightBitLayout
from headinfer.packed.layout import ADDRESS_BYTES, PAGE_TOKENS, num_pages


def largest_kept(dtype: torch.dtype) -> float:
    """Return the largest magnitude of a page in 8 bits: no code times its scale is infinite."""
    return torch.finfo(dtype).max / 2


def pack(code: Code, values: torch.Tensor, pages: torch.Tensor | None = None) -> torch.Tensor:
    """Round keys or values.

    Pages that are to be kept as they are say so, and hold an address of 0: see `kept_as_they_are`
    and `set_raw_address`.

    Args:
        code: of 8 bits.
        values: `[batch, heads, tokens, dim]` of a floating dtype, any strides.
        pages: `[batch, heads, pages, page_bytes]` of uint8 on the same device, any strides with a
            unit last one, for the tokens from 0 on. All bytes of these pages are written. New
            memory by default.

    Returns:
        The pages.
    """
    batch, heads, tokens, dim = values.shape
    layout, count = EightBitLayout(code, dim), num_pages(tokens)
    if pages is None:
        shape = (batch, heads, count, layout.page_bytes)
        pages = torch.empty(shape, dtype=torch.uint8, device=values.device)
    padded = F.pad(values.float(), (0, 0, 0, count * PAGE_TOKENS - tokens))
    numbers = padded.reshape(batch, heads, count, PAGE_TOKENS, dim)
    magnitudes = numbers.abs()
    rounds = (magnitudes <= largest_kept(values.dtype)).all(-1).all(-1)
    if tokens % PAGE_TOKENS:
        rounds[..., -1] = False
    most = magnitudes.amax(-2 if code is Code.INT8 else (-2, -1))
    most = most.view(batch, heads, count, layout.scales)
    bits = _scale_bits(most, code)
    scales = _scales(bits)
    divisors = torch.where(scales > 0, scales, torch.inf)
    codes = _codes(numbers / divisors[..., None, :], code).view(batch, heads, count, -1)
    raw = torch.zeros_like(bits)
    raw[..., 0] = RAW_SCALE
    bits = torch.where(rounds[..., None], bits, raw)
    pages.zero_()
    pages[..., : layout.scales_at] = torch.where(rounds[..., None], codes, 0)
    end = layout.scales_at + 2 * layout.scales
    pages[..., layout.scales_at : end : 2] = bits & 0xFF
    pages[..., layout.scales_at + 1 : end : 2] = bits >> 8
    return pages


def unpack(code: Code, pages: torch.Tensor, values: torch.Tensor) -> None:
    """Give the values of the first tokens of some pages.

    Args:
        code: of 8 bits.
        pages: `[batch, heads, pages, page_bytes]` of uint8, any strides with a unit last one. The
            values of pages that are kept as they are are read from the CPU's memory.
        values: `[batch, heads, tokens, dim]` on the same device, any strides; written.
    """
    batch, heads, tokens, dim = values.shape
    layout, count = EightBitLayout(code, dim), num_pages(tokens)
    pages = pages[:, :, :count]
    numbers = _numbers(pages[..., : layout.scales_at].contiguous(), code)
    end = layout.scales_at + 2 * layout.scales
    low = pages[..., layout.scales_at : end : 2].int()
    scales = _scales(low | pages[..., layout.scales_at + 1 : end : 2].int() << 8)
    numbers = numbers.view(batch, heads, count, PAGE_TOKENS, dim) * scales[..., None, :]
    found = numbers.to(values.dtype)
    for page in kept_as_they_are(pages, layout).nonzero().tolist():
        found[tuple(page)] = _raw(pages[tuple(page)], dim, values.dtype).to(found.device)
    values.copy_(found.view(batch, heads, count * PAGE_TOKENS, dim)[:, :, :tokens])


def kept_as_they_are(pages: torch.Tensor, layout: EightBitLayout) -> torch.Tensor:
    """Return which pages are not in 8 bits, bool `[batch, heads, pages]`."""
    low, high = (pages[..., layout.scales_at + byte] for byte in (0, 1))
    return (low == RAW_SCALE & 0xFF) & (high == RAW_SCALE >> 8)


def set_raw_address(page: torch.Tensor, address: int) -> None:
    """Write into a page that is kept as it is where its values lie.

    Args:
        page: `[page_bytes]` of uint8.
        address: of `[64, dim]` values, in memory that lives as long as the page.
    """
    given = bytearray(address.to_bytes(ADDRESS_BYTES, "little"))
    page[:ADDRESS_BYTES] = torch.frombuffer(given, dtype=torch.uint8).to(page.device)


def _scale_bits(most: torch.Tensor, code: Code) -> torch.Tensor:
    """Return the bits of scales as int32: over what the largest magnitudes need, if at all."""
    wanted = (most * (1 / code.most)).contiguous().view(torch.int32)
    bits = (wanted + 0xFFFF) >> 16
    return torch.where(bits < LEAST_SCALE_BITS, 0, bits)


def _scales(bits: torch.Tensor) -> torch.Tensor:
    return (bits << 16).view(torch.float32)


def _codes(numbers: torch.Tensor, code: Code) -> torch.Tensor:
    """Return codes as uint8; what comes of numbers that are not finite is left out."""
    if code is Code.INT8:
        whole = torch.floor(numbers + 0.5).nan_to_num(0.0).clamp(-127, 127)
        return whole.to(torch.int8).view(torch.uint8)
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8)


def _numbers(codes: torch.Tensor, code: Code) -> torch.Tensor:
    stored = torch.int8 if code is Code.INT8 else torch.float8_e4m3fn
    return codes.view(stored).float()


def _raw(page: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a page's values as they are, `[64, dim]` on the CPU."""
    address = int.from_bytes(bytes(page[:ADDRESS_BYTES].tolist()), "little")
    assert address, "a page is kept as it is, and nobody kept its values"
    raw = (ctypes.c_char * (PAGE_TOKENS * dim * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(PAGE_TOKENS, dim)
