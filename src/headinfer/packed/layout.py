"""The bytes of a packed page: where each part lies, and how many there are.

A page is 64 tokens of one KV head, of keys or of values. Its bytes, in this order:

- sign and mantissa of each value, 8 bits, token by token: the bits that do not compress;
- codes of the exponents, 4 bits each. Byte `i` has that of value `i` in its low half. In its high
  half it has that of the value 32 tokens later, so that both halves of a page are streams;
- a header of 8 bytes;
- the escapes.

Code 0 is an exponent of 0, as of zeros and subnormals. Codes 1 to 14 are `base + code`, where the
base is the page's own. Code 15 is an escape: its value's place in the page and its exponent are
listed.

The header has the number of escapes (2 bytes), the base (1), 1 where the page has overflowed (1),
and zeros (4). Places are 2 bytes each, in ascending order. Exponents are 1 byte each, behind all
places. What is not used is 0, so that equal values are packed into equal bytes. Numbers are
little-endian.

A page with more escapes than there is room for has overflowed, and lists none. Its places begin
with an address, 8 bytes: that of its values as they are, `[64, dim]` of bfloat16. It is a multiple
of 16. Whoever packed the page owns that memory.
"""

from dataclasses import dataclass
from typing import NamedTuple

PAGE_TOKENS = 64
"""Tokens of a page. What of a page holds no token is packed as zeros."""

WINDOW = 14
"""Exponents that have codes of their own, beside 0."""

ESCAPE = 15
"""The code of all other exponents."""

MAX_BASE = 255 - WINDOW

HEADER_BYTES = 8
_BASE_AT = 2  # the byte behind says whether the page has overflowed
ADDRESS_BYTES = 8
_ESCAPE_BYTES = 3
_DIM_MULTIPLE = 16
_MAX_DIM = 1024  # places of escapes are 16 bits
_LINE_BYTES = 64


def packs(dim: int) -> bool:
    """Whether keys or values of so many elements can be packed."""
    return 0 < dim <= _MAX_DIM and dim % _DIM_MULTIPLE == 0


class RawFlag(NamedTuple):
    """A mark of pages that are kept as they are: where it is, and where they say they lie.

    Attributes:
        at: where two bytes of a page are, little-endian.
        mask: which bits of them matter.
        bits: what these are in a page that is kept as it is.
        address_at: where the address of its values begins.
    """

    at: int
    mask: int
    bits: int
    address_at: int


@dataclass(frozen=True, slots=True)
class PageLayout:
    """A layout of the pages of one dim.

    Attributes:
        dim: elements of one key or value; one that `packs`.
    """

    dim: int

    @property
    def values(self) -> int:
        """Values of a page."""
        return PAGE_TOKENS * self.dim

    @property
    def codes_at(self) -> int:
        """Where the codes begin, in bytes."""
        return self.values

    @property
    def header_at(self) -> int:
        """Where the header begins, in bytes."""
        return self.values * 3 // 2

    @property
    def places_at(self) -> int:
        """Where the places of escapes begin, or the address of the values as they are, in bytes."""
        return self.header_at + HEADER_BYTES

    @property
    def exponents_at(self) -> int:
        """Where the exponents of escapes begin, in bytes."""
        return self.places_at + 2 * self.max_escapes

    @property
    def max_escapes(self) -> int:
        """Escapes there is room for."""
        return (self._area_bytes - HEADER_BYTES) // _ESCAPE_BYTES

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, a multiple of 64."""
        return self.header_at + self._area_bytes

    @property
    def raw_flag(self) -> RawFlag:
        """What marks a page that has overflowed."""
        return RawFlag(self.header_at + _BASE_AT, 0xFF00, 1 << 8, self.places_at)

    @property
    def raw_bytes(self) -> int:
        """Bytes of a page's values as they are."""
        return self.values * 2

    @property
    def definitions(self) -> dict[str, int]:
        """What the kernels in C are told of it."""
        return {
            "HEAD_DIM": self.dim,
            "PAGE_BYTES": self.page_bytes,
            "MAX_ESCAPES": self.max_escapes,
        }

    @property
    def _area_bytes(self) -> int:
        """Bytes of header and escapes: up to 0.35 bits a value, in whole cache lines."""
        return max(self.dim * 11 // 4 // _LINE_BYTES, 1) * _LINE_BYTES


def num_pages(tokens: int) -> int:
    """Pages of so many tokens; the last one may be partly filled."""
    return -(-tokens // PAGE_TOKENS)
