"""What caches hold, for whoever looks on while another thread uses them."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from headinfer.engine.parted import CacheEngine
from headinfer.integration.room import held_host_bytes
from headinfer.plan.format import Format
from headinfer.units import counted, format_bytes

if TYPE_CHECKING:
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


def held_by(cache: "OffloadedCache") -> Holding:
    """Return what a cache holds, without waiting for a call that is under way."""
    engine = cache.state.engine
    if engine is None or engine.closed:
        return Holding(0, 0, 0)
    return Holding(engine.parts[0].held_tokens, engine.device_kv_bytes, engine.host_kv_bytes)


def described(cache: "OffloadedCache") -> str:
    """Return what a cache holds in words, without waiting for a call that is under way."""
    engine, held = cache.state.engine, held_by(cache)
    if cache.state.closed or (engine is not None and engine.closed):
        return "closed"
    if engine is None:
        return f"no tokens, {counted(len(cache.layers), 'layer')}"
    rows = engine.plan.batch
    of_rows = "" if rows == 1 else f" in each of {rows} rows"
    return (
        f"{counted(held.tokens, 'token')}{of_rows}, {counted(len(cache.layers), 'layer')}, "
        f"{_memory(held.host_bytes, held.device_bytes)}"
    )


def described_together(engines: Iterable[CacheEngine], form: Format) -> str:
    """Return the forms and the memory of all caches in words, without waiting for a call.

    Args:
        engines: of the caches.
        form: where there are none.
    """
    held = [engine for engine in engines if not engine.closed]
    forms = {engine.plan.shape.host_format.value for engine in held} or {form.value}
    memory = _memory(held_host_bytes(held), sum(engine.device_kv_bytes for engine in held))
    return f"{' and '.join(sorted(forms))} KV cache with {memory}"


def _memory(host_bytes: int, device_bytes: int) -> str:
    on_gpu = f", {format_bytes(device_bytes)} of GPU memory" if device_bytes else ""
    return f"{format_bytes(host_bytes)} of CPU memory{on_gpu}"


def held_together(caches: "Sequence[OffloadedCache]") -> int:
    """Return the CPU memory that caches hold; what several of one row share counts once."""
    engines = [each.state.engine for each in caches]
    return held_host_bytes([each for each in engines if each is not None and not each.closed])
