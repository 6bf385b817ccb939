"""Keys and values to be packed, of every kind, and the memory of pages that overflow."""

import torch
import torch.nn.functional as F

from headinfer.packed.layout import PAGE_TOKENS, PageLayout
from headinfer.packed.reference import overflowed, set_raw_address

KINDS = ("normal", "any bits", "special", "zeros", "full", "one too many")


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """What must come back: a comparison of numbers would pass over NaN and the sign of zero."""
    return values.view(torch.int16)


def drawn(kind: str, shape: tuple[int, int, int, int], seed: int = 0) -> torch.Tensor:
    """Return `[batch, heads, tokens, dim]` of bfloat16.

    Kinds are normal values, any bits (every page overflows), NaN with payloads, infinities,
    subnormals and zeros among normal ones, zeros of both signs, and pages with as many escapes as
    there is room for, or with one more.
    """
    generator = torch.Generator().manual_seed(seed)
    dim, room = shape[-1], PageLayout(shape[-1]).max_escapes
    bits = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int32)
    if kind == "any bits":
        return bits.short().view(torch.bfloat16)
    if kind == "zeros":
        return (bits & -(2**15)).short().view(torch.bfloat16)
    values = torch.randn(shape, generator=generator).to(torch.bfloat16)
    if kind == "normal":
        return values
    if kind == "special":
        special = [0x7FC1, 0xFF81, 0x7F80, 0xFF80, 0x0001, 0x807F, 0x0000, 0x8000, 0x7F7F, 0x0080]
        chosen = torch.tensor(special)[torch.randint(len(special), shape, generator=generator)]
        rare = torch.rand(shape, generator=generator) < room / 4 / (PAGE_TOKENS * dim)
        return torch.where(rare, chosen, bits_of(values).int()).short().view(torch.bfloat16)
    # One exponent, but for so many values anywhere in each page whose exponents are far from it.
    tokens = shape[2]
    pages = -(-tokens // PAGE_TOKENS)
    exponents = torch.full((*shape[:2], pages, PAGE_TOKENS * dim), 110)
    inside = min(tokens - (pages - 1) * PAGE_TOKENS, PAGE_TOKENS) * dim
    order = torch.rand((*shape[:2], pages, inside), generator=generator).argsort(-1)
    count = room if kind == "full" else room + 1
    exponents.scatter_(-1, order[..., :count], 126)
    exponents = exponents.view(*shape[:2], pages * PAGE_TOKENS, dim)[:, :, :tokens]
    return (bits & ~0x7F80 | exponents << 7).short().view(torch.bfloat16)


def keep_raw(pages: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Give pages that have overflowed their values; return the memory, which must outlive them."""
    batch, heads, tokens, dim = values.shape
    count = pages.shape[2]
    raw = F.pad(bits_of(values), (0, 0, 0, count * PAGE_TOKENS - tokens)).contiguous()
    raw = raw.view(batch, heads, count, PAGE_TOKENS * dim)
    for place in overflowed(pages, dim).nonzero().tolist():
        set_raw_address(pages[tuple(place)], dim, raw[tuple(place)].data_ptr())
    return raw
