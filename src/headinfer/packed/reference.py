"""Packing and unpacking by torch's operations, on any device.

The kernels are compared with it, to the last bit of a page.
"""

import ctypes

import torch
import torch.nn.functional as F

from headinfer.packed.layout import (
    ADDRESS_BYTES,
    ESCAPE,
    MAX_BASE,
    PAGE_TOKENS,
    WINDOW,
    PageLayout,
    num_pages,
)

_EXPONENTS = 256


def pack(values: torch.Tensor, pages: torch.Tensor | None = None) -> torch.Tensor:
    """Pack keys or values.

    Pages that overflow say so, and hold an address of 0: see `overflowed` and `set_raw_address`.

    Args:
        values: `[batch, heads, tokens, dim]` of bfloat16, any strides. Any bits come back.
        pages: `[batch, heads, pages, page_bytes]` of uint8 on the same device, any strides with a
            unit last one, for the tokens from 0 on. All bytes of these pages are written. New
            memory by default.

    Returns:
        The pages.
    """
    batch, heads, tokens, dim = values.shape
    layout, count = PageLayout(dim), num_pages(tokens)
    if pages is None:
        shape = (batch, heads, count, layout.page_bytes)
        pages = torch.empty(shape, dtype=torch.uint8, device=values.device)
    padded = F.pad(values.view(torch.int16), (0, 0, 0, count * PAGE_TOKENS - tokens))
    bits = padded.reshape(batch, heads, count, layout.values).int()
    exponents = bits >> 7 & 0xFF
    base = _bases(exponents)
    codes = exponents - base[..., None]
    escaped = (exponents > 0) & ((codes < 1) | (codes > WINDOW))
    codes = torch.where(escaped, ESCAPE, torch.where(exponents > 0, codes, 0))
    low, high = codes.chunk(2, -1)
    escapes = escaped.sum(-1)
    over = escapes > layout.max_escapes
    escapes = torch.where(over, 0, escapes)
    header = torch.stack([escapes & 0xFF, escapes >> 8, base, over], -1)
    places, listed = _listed(exponents, escaped & ~over[..., None], layout.max_escapes)
    pages.zero_()
    pages[..., : layout.codes_at] = (bits >> 8 & 0x80 | bits & 0x7F).to(torch.uint8)
    pages[..., layout.codes_at : layout.header_at] = (low | high << 4).to(torch.uint8)
    pages[..., layout.header_at : layout.header_at + header.shape[-1]] = header.to(torch.uint8)
    pages[..., layout.places_at : layout.exponents_at : 2] = places & 0xFF
    pages[..., layout.places_at + 1 : layout.exponents_at : 2] = places >> 8
    end = layout.exponents_at + layout.max_escapes
    pages[..., layout.exponents_at : end] = listed
    return pages


def unpack(
    pages: torch.Tensor, dim: int, tokens: int, values: torch.Tensor | None = None
) -> torch.Tensor:
    """Unpack the first tokens of some pages.

    Args:
        pages: `[batch, heads, pages, page_bytes]` of uint8, any strides with a unit last one. The
            values of pages that have overflowed are read from the CPU's memory.
        dim: elements of one key or value.
        tokens: how many.
        values: `[batch, heads, tokens, dim]` of bfloat16 on the same device, any strides, which
            are written. New memory by default.

    Returns:
        The values.
    """
    batch, heads = pages.shape[:2]
    layout, count = PageLayout(dim), num_pages(tokens)
    pages = pages[:, :, :count]
    kept = pages[..., : layout.codes_at].int()
    packed = pages[..., layout.codes_at : layout.header_at].int()
    codes = torch.cat([packed & 0xF, packed >> 4], -1)
    escapes, base = _header(pages, layout)
    exponents = torch.where(codes > 0, base[..., None] + codes, 0)
    places, listed = _escapes(pages, layout)
    used = torch.arange(layout.max_escapes, device=pages.device) < escapes[..., None]
    # What is not used goes behind the page's values.
    exponents = F.pad(exponents, (0, 1)).scatter_(
        -1, torch.where(used, places, layout.values), listed
    )[..., :-1]
    bits = (kept & 0x80) << 8 | exponents << 7 | kept & 0x7F
    for page in overflowed(pages, dim).nonzero().tolist():
        bits[tuple(page)] = _raw(pages[tuple(page)], layout).to(bits)
    whole = bits.to(torch.int16).view(torch.bfloat16)
    found = whole.view(batch, heads, count * PAGE_TOKENS, dim)[:, :, :tokens]
    return found if values is None else values.copy_(found)


def overflowed(pages: torch.Tensor, dim: int) -> torch.Tensor:
    """Return which pages have more escapes than there is room for, bool `[batch, heads, pages]`."""
    return pages[..., PageLayout(dim).header_at + 3] != 0


def set_raw_address(page: torch.Tensor, dim: int, address: int) -> None:
    """Write into a page that has overflowed where its values lie as they are.

    Args:
        page: `[page_bytes]` of uint8.
        dim: elements of one key or value.
        address: of `[64, dim]` of bfloat16, in memory that lives as long as the page.
    """
    at = PageLayout(dim).places_at
    given = torch.frombuffer(
        bytearray(address.to_bytes(ADDRESS_BYTES, "little")), dtype=torch.uint8
    )
    page[at : at + ADDRESS_BYTES] = given.to(page.device)


def raw_address(page: torch.Tensor, dim: int) -> int:
    """Return what `set_raw_address` wrote; 0 before that."""
    at = PageLayout(dim).places_at
    return int.from_bytes(bytes(page[at : at + ADDRESS_BYTES].tolist()), "little")


def _bases(exponents: torch.Tensor) -> torch.Tensor:
    """Return the base of each page that leaves the fewest escapes, the lowest of several."""
    shape, rows = exponents.shape[:-1], exponents.flatten(0, -2)
    counts = exponents.new_zeros(len(rows), _EXPONENTS)
    counts.scatter_add_(1, rows.long(), torch.ones_like(rows))
    up_to = counts.cumsum(1)
    inside = up_to[:, WINDOW:] - up_to[:, : MAX_BASE + 1]
    # The first of the highest, which argmax does not promise.
    first = (inside == inside.amax(1, keepdim=True)).int().cumsum(1).eq(0).sum(1)
    return first.view(shape).int()


def _listed(
    exponents: torch.Tensor, escaped: torch.Tensor, room: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return places and exponents of what is escaped, `[..., room]` each, zeros behind them."""
    slots = torch.where(escaped, escaped.cumsum(-1) - 1, room)
    shape = (*exponents.shape[:-1], room + 1)
    places = torch.arange(exponents.shape[-1], device=exponents.device, dtype=exponents.dtype)
    lists = (
        exponents.new_zeros(shape).scatter_(-1, slots, listed)[..., :room]
        for listed in (places.expand(exponents.shape), exponents)
    )
    first, second = lists
    return first, second


def _header(pages: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the number of escapes listed in each page, and its base."""
    low, high, base = (pages[..., layout.header_at + byte].int() for byte in range(3))
    return low | high << 8, base


def _escapes(pages: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Return places (int64) and exponents (int32) as they are listed."""
    end = layout.exponents_at + layout.max_escapes
    low = pages[..., layout.places_at : layout.exponents_at : 2].long()
    high = pages[..., layout.places_at + 1 : layout.exponents_at : 2].long()
    return low | high << 8, pages[..., layout.exponents_at : end].int()


def _raw(page: torch.Tensor, layout: PageLayout) -> torch.Tensor:
    """Return the bits of a page's values as they are, int16 `[64 * dim]` on the CPU."""
    address = raw_address(page, layout.dim)
    assert address, "a page has overflowed, and nobody kept its values"
    raw = (ctypes.c_char * layout.raw_bytes).from_address(address)
    return torch.frombuffer(raw, dtype=torch.int16)
