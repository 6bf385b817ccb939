"""The bytes of a page in 8 bits a value: where each part lies, and how many there are.

A page is 64 tokens of one KV head, of keys or of values. Its bytes, in this order:

- a code of each value, 8 bits, token by token;
- scales, bfloat16, little-endian. `INT8` has one for each element of a key or value, which all 64
  tokens share: some elements of keys are large in every token. `FP8` has one for the page, and
  zeros behind it up to 16 bytes.

A value is its code times its scale, in float32, rounded to the dtype. A scale is the largest
magnitude over the largest code, rounded up, and 0 below 2^-126.

A page is kept as it is while it is not full. The same holds where a value is not finite, or beyond
half of the largest number of its dtype. Its first scale is NaN then, and its bytes begin with an
address, 8 bytes: that of its values, `[64, dim]`. All else of it is 0. So a page is rounded once,
when it is full. One that grows token by token has the bytes of one that came as a whole.
"""

import enum
from dataclasses import dataclass

from headinfer.packed.layout import PAGE_TOKENS, RawFlag

RAW_SCALE = 0x7FC0
"""The bits of the first scale of a page that is kept as it is."""

LEAST_SCALE_BITS = 0x0080
"""The bits of the least scale that is not 0: smaller numbers are 0 on some processors."""

_SCALE_BYTES = 2
_FP8_SCALES = 8


class Code(enum.Enum):
    """A code of 8 bits."""

    INT8 = "int8"
    """Whole numbers from -127 to 127."""

    FP8 = "fp8"
    """Floating point with 4 bits of exponent and 3 of mantissa: torch's `float8_e4m3fn`."""

    @property
    def most(self) -> int:
        """The largest code's number."""
        return 127 if self is Code.INT8 else 448


@dataclass(frozen=True, slots=True)
class EightBitLayout:
    """A layout of the pages of one dim.

    Attributes:
        code: of the values.
        dim: elements of one key or value; a multiple of 16.
    """

    code: Code
    dim: int

    @property
    def values(self) -> int:
        """Values of a page."""
        return PAGE_TOKENS * self.dim

    @property
    def scales_at(self) -> int:
        """Where the scales begin, in bytes."""
        return self.values

    @property
    def scales(self) -> int:
        """Scales of a page."""
        return self.dim if self.code is Code.INT8 else 1

    @property
    def raw_flag(self) -> RawFlag:
        """What marks a page that is kept as it is."""
        return RawFlag(self.scales_at, 0xFFFF, RAW_SCALE, 0)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, a multiple of 16."""
        scales = self.dim if self.code is Code.INT8 else _FP8_SCALES
        return self.scales_at + _SCALE_BYTES * scales

    @property
    def definitions(self) -> dict[str, int]:
        """What the kernels in C are told of it."""
        name = "INT8_PAGES" if self.code is Code.INT8 else "FP8_PAGES"
        return {name: 1, "PAGE_BYTES": self.page_bytes}
