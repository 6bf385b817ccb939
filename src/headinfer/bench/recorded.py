"""Keys and values whose exponents are distributed as those of real models, to be packed.

Normal values flatter a code for exponents: real ones are more varied. What is drawn follows
`exponents.json`, which `benchmarks/recorded_exponents.py` writes.
"""

import functools
import json
from importlib import resources
from typing import Any, NamedTuple

import torch

_RANDOM_BITS = 256


class _Exponents(NamedTuple):
    """A distribution of exponents of some layers' keys, or values.

    Attributes:
        bases: that pages have.
        base_counts: how often.
        offsets: of exponents from their page's base; the first stands for an exponent of 0.
        up_to: shares of all values up to each offset, the last 1.
    """

    bases: torch.Tensor
    base_counts: torch.Tensor
    offsets: torch.Tensor
    up_to: torch.Tensor


def recorded_values(
    shape: tuple[int, ...], part: str, layer: int, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Draw keys or values, of which each head has a base of its own.

    Args:
        shape: `[batch, heads, tokens, dim]`.
        part: "keys" or "values".
        layer: its number; layers take turns with the kinds of layers that were recorded.
        dtype: of the result; values are exact in bfloat16.
        generator: of random numbers, on the device of the result.
    """
    kinds, device = _recorded()[part], generator.device
    kind = _Exponents(*(values.to(device) for values in kinds[layer % len(kinds)]))
    heads = shape[0] * shape[1]
    chosen = torch.multinomial(kind.base_counts, heads, replacement=True, generator=generator)
    bases = kind.bases[chosen].view(*shape[:2], 1, 1)
    drawn = torch.rand(shape, generator=generator, device=device)
    indices = torch.searchsorted(kind.up_to, drawn, right=True)
    exponents = torch.where(indices > 0, bases + kind.offsets[indices], 0)
    rest = torch.randint(_RANDOM_BITS, shape, generator=generator, device=device, dtype=torch.int32)
    bits = (rest & 0x80) << 8 | exponents << 7 | rest & 0x7F
    return bits.to(torch.int16).view(torch.bfloat16).to(dtype)


@functools.cache
def _recorded() -> dict[str, list[_Exponents]]:
    """Return the distributions of keys and of values, by kinds of layers."""
    text = resources.files(__package__).joinpath("exponents.json").read_text(encoding="utf-8")
    found: dict[str, list[_Exponents]] = {"keys": [], "values": []}
    for row in json.loads(text)["rows"]:
        found[row["part"]].append(_exponents(row))
    return found


def _exponents(row: dict[str, Any]) -> _Exponents:
    bases, offsets = row["bases"], row["offsets"]
    counts = torch.tensor([row["zeros"], *offsets.values()], dtype=torch.float64)
    up_to = (counts.cumsum(0) / counts.sum()).float()
    up_to[-1] = 1
    return _Exponents(
        torch.tensor([int(base) for base in bases], dtype=torch.int32),
        torch.tensor(list(bases.values()), dtype=torch.float32),
        torch.tensor([0, *map(int, offsets)], dtype=torch.int32),
        up_to,
    )
