"""The unit that a schedule is made for: heads of a layer that are treated alike."""

from typing import NamedTuple


class Track(NamedTuple):
    """A group of KV heads of one layer that see equally far back, on one device.

    A layer is one track, or two where some of its heads stream.

    Attributes:
        kv_heads: number of KV heads.
        window_tokens: the reach: tokens that a query sees, its own included; None for all.
        sink_tokens: the oldest tokens, which a query sees beside its window.
    """

    kv_heads: int
    window_tokens: int | None = None
    sink_tokens: int = 0
