"""Keys and values for pages in 8 bits, and the memory of those that are kept as they are."""

import torch
import torch.nn.functional as F

from headinfer.eight_bits.layout import Code, EightBitLayout
from headinfer.eight_bits.reference import kept_as_they_are, set_raw_address, unpack
from headinfer.packed.layout import PAGE_TOKENS

KINDS = ("normal", "outliers", "tiny", "zeros", "special", "largest")


def drawn(
    kind: str,
    shape: tuple[int, int, int, int],
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return `[batch, heads, tokens, dim]`.

    Kinds are normal values, some with elements that are large in every token, so small that their
    scales are the least or 0, zeros, some NaN and infinities, and numbers near the dtype's largest.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    if kind == "outliers":
        values[..., ::7] *= 100
    elif kind == "tiny":
        values *= torch.finfo(torch.bfloat16).tiny * 100
    elif kind == "zeros":
        values *= 0
    elif kind == "special":
        special = torch.tensor([torch.nan, torch.inf, -torch.inf])
        chosen = special[torch.randint(3, shape, generator=generator)]
        rare = torch.rand(shape, generator=generator) < 1 / (PAGE_TOKENS * shape[-1])
        values = torch.where(rare, chosen, values)
    elif kind == "largest":
        values = values.clamp(-1, 1) * torch.finfo(dtype).max
    return values.to(dtype)


def keep_raw(code: Code, pages: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Give pages that are kept as they are their values; return memory that must outlive them."""
    batch, heads, tokens, dim = values.shape
    count = pages.shape[2]
    raw = F.pad(values, (0, 0, 0, count * PAGE_TOKENS - tokens)).contiguous()
    raw = raw.view(batch, heads, count, PAGE_TOKENS * dim)
    for place in kept_as_they_are(pages, EightBitLayout(code, dim)).nonzero().tolist():
        set_raw_address(pages[tuple(place)], raw[tuple(place)].data_ptr())
    return raw


def unpacked(code: Code, pages: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return what some pages give, of the shape and dtype of some values."""
    found = torch.zeros_like(values)
    unpack(code, pages, found)
    return found
