"""What a cache holds, for whoever looks on while another thread uses it."""

from typing import NamedTuple

from headinfer.integration.cache import OffloadedCache


class Holding(NamedTuple):
    """A count of what one cache holds.

    Attributes:
        tokens: of each row.
        device_bytes: GPU memory for them.
        host_bytes: CPU memory for them; what several caches share counts for each.
    """

    tokens: int
    device_bytes: int
    host_bytes: int


def held_by(cache: OffloadedCache) -> Holding:
    """Return what a cache holds, without waiting for a call that is under way."""
    engine = cache.state.engine
    if engine is None or engine.closed:
        return Holding(0, 0, 0)
    return Holding(engine.parts[0].held_tokens, engine.device_kv_bytes, engine.host_kv_bytes)
