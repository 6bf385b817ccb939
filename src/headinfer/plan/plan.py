"""From options to a plan: the sizes of chunks and tiles, and the bytes they take."""

from collections.abc import Iterator
from dataclasses import dataclass

from headinfer.errors import MemoryPlanError, OptionError
from headinfer.plan import memory
from headinfer.plan.options import Options
from headinfer.plan.shape import ModelShape
from headinfer.units import format_bytes, format_tokens

PAGE_TOKENS = 64
"""Tokens of one decode-tail page: 32 layers of Llama-3-8B then send 8 MiB home at a time."""

_LEAST_CONTEXT_TOKENS = 8192
"""Staging is made for at least such a context, however short the first prompt is."""

MIN_CHUNK_TOKENS = 128
MIN_TILE_TOKENS = 256
_CHUNK_CHOICES = (8192, 4096, 2048, 1024, 512, 256, MIN_CHUNK_TOKENS)
_CPU_CHUNK_TOKENS = 512
_TILE_TARGET_BYTES = 64 * 2**20
"""A copy of 64 MiB takes 2.5 ms at 25 GB/s: three orders above what starting it costs."""

ALL_TOKENS = 2**40
"""Tile size of a tile that is never split; only where tiles are views and take no memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was chosen for one model, batch and expected context, and the bytes it takes.

    Attributes:
        shape: the model.
        device: name of the device kind: "cpu", "cuda" or "simulated".
        overlap: whether copies run ahead of attention.
        batch: rows the plan is for (beams and returned sequences included).
        context_tokens: tokens expected in the cache; None until a prompt is known.
        chunk_tokens: tokens of one prefill chunk.
        tile_heads: KV heads of one tile.
        tile_tokens: tokens of one tile.
        page_tokens: tokens of one page of the decode tail.
        device_memory_bytes: the budget; None for no limit.
        staging_bytes: the buffers that tiles are fetched into.
        tail_bytes: the newest tokens of every offloaded layer.
        chunk_page_bytes: the pages a chunk is written back from.
        window_bytes: the sliding-window layers' own caches.
        activation_bytes: estimate of one chunk's activations.
        resident_tokens: the oldest tokens of every offloaded layer, kept on the device.
        resident_bytes: the bytes they take.
        host_share: share of the tokens that are not resident, which the CPU attends in a decode
            step.
    """

    shape: ModelShape
    device: str
    overlap: bool
    batch: int
    context_tokens: int | None
    chunk_tokens: int
    tile_heads: int
    tile_tokens: int
    page_tokens: int
    device_memory_bytes: int | None
    staging_bytes: int
    tail_bytes: int
    chunk_page_bytes: int
    window_bytes: int
    activation_bytes: int
    resident_tokens: int = 0
    resident_bytes: int = 0
    host_share: float = 0.0

    @property
    def arena_bytes(self) -> int:
        """Bytes of device memory the engine allocates, once, for offloaded KV."""
        pieces = self.staging_bytes + self.tail_bytes + self.chunk_page_bytes + self.resident_bytes
        return pieces and pieces + memory.ALIGNMENT_BYTES

    @property
    def kv_device_bytes(self) -> int:
        """All bytes of KV on the device: the arena and the sliding windows."""
        return self.arena_bytes + self.window_bytes

    @property
    def total_device_bytes(self) -> int:
        """Weights, KV and activations on the device."""
        return self.shape.weights_bytes + self.kv_device_bytes + self.activation_bytes

    def kv_host_bytes(self, tokens: int) -> int:
        """Bytes of host memory the store takes for `tokens` tokens in each row."""
        return self.shape.kv_bytes(tokens, self.batch)

    def lines(self) -> Iterator[str]:
        """Yield the plan as a few lines for people."""
        tokens = "all" if self.tile_tokens >= ALL_TOKENS else format_tokens(self.tile_tokens)
        heads = "head" if self.tile_heads == 1 else "heads"
        how = "copies overlap attention" if self.overlap else "synchronous copies"
        if self.device == "cpu":
            how = "tiles are attended in place"
        yield (
            f"tiles of {self.tile_heads} KV {heads} x {tokens} tokens, "
            f"chunks of {format_tokens(self.chunk_tokens)} tokens; {how}"
        )
        budget = self.device_memory_bytes
        yield (
            f"{self.device} memory {format_bytes(self.total_device_bytes)}"
            f"{f' of {format_bytes(budget)}' if budget else ''}: "
            f"weights {format_bytes(self.shape.weights_bytes)}, "
            f"KV {format_bytes(self.kv_device_bytes)}, "
            f"activations {format_bytes(self.activation_bytes)} (estimate)"
        )
        if self.context_tokens is not None:
            yield (
                f"host memory for the KV cache of {format_tokens(self.context_tokens)} tokens: "
                f"{format_bytes(self.kv_host_bytes(self.context_tokens))}"
            )

    def __str__(self) -> str:
        """Return `lines`, one below the other."""
        return "\n".join(self.lines())


def resolve(
    shape: ModelShape,
    options: Options,
    *,
    device: str,
    batch: int = 1,
    context_tokens: int | None = None,
) -> Plan:
    """Turn options into a plan that fits, choosing what was left to "auto".

    Args:
        shape: the model.
        options: what the user set.
        device: the kind of device: "cpu", "cuda" or "simulated".
        batch: rows of the cache.
        context_tokens: tokens expected in the cache; None when not known yet.

    Raises:
        OptionError: a tile is larger than the model allows.
        MemoryPlanError: no choice of the open settings fits the device memory.
    """
    if isinstance(options.tile_heads, int) and 0 < shape.kv_heads < options.tile_heads:
        raise OptionError(
            f"tile_heads is {options.tile_heads}, but {shape.name} has {shape.kv_heads} KV heads; "
            f"use a number from 1 to {shape.kv_heads}, or 'all'"
        )
    if options.tile_tokens == "all" and device != "cpu" and context_tokens is None:
        context_tokens = shape.max_positions or None
        if context_tokens is None:
            raise OptionError("tile_tokens 'all' needs a known context; give a number of tokens")
    last = None
    for candidate in _candidates(shape, options, device, batch, context_tokens):
        last = candidate
        if _fits(candidate):
            return candidate
    raise _refusal(last, _smallest(shape, device, options, batch, context_tokens))


def _fits(plan: Plan) -> bool:
    budget = plan.device_memory_bytes
    return budget is None or plan.total_device_bytes <= budget


def _candidates(
    shape: ModelShape, options: Options, device: str, batch: int, context_tokens: int | None
) -> Iterator[Plan]:
    """Yield plans from the largest transfers to the smallest."""
    if options.chunk_tokens != "auto":
        chunks: tuple[int, ...] = (options.chunk_tokens,)
    else:
        largest = _CPU_CHUNK_TOKENS if device == "cpu" else _CHUNK_CHOICES[0]
        chunks = tuple(choice for choice in _CHUNK_CHOICES if choice <= largest)
    for chunk_tokens in chunks:
        for tile_heads, tile_tokens in _tiles(shape, options, device, context_tokens):
            yield _plan(
                shape, options, device, batch, context_tokens, chunk_tokens, tile_heads, tile_tokens
            )


def _tiles(
    shape: ModelShape, options: Options, device: str, context_tokens: int | None
) -> Iterator[tuple[int, int]]:
    heads_all = max(shape.kv_heads, 1)
    copies = device != "cpu"
    heads: list[int]
    if isinstance(options.tile_heads, int):
        heads = [options.tile_heads]
    elif options.tile_heads == "all" or not copies:
        heads = [heads_all]
    else:
        heads = [heads_all] + [n for n in (8, 4, 2, 1) if n < heads_all]
    for tile_heads in heads:
        if isinstance(options.tile_tokens, int):
            yield tile_heads, options.tile_tokens
        elif not copies:
            yield tile_heads, ALL_TOKENS
        elif options.tile_tokens == "all":
            yield tile_heads, context_tokens or ALL_TOKENS
        else:
            per_token = max(shape.kv_bytes(1) // max(len(shape.full_layers), 1), 1)
            per_token = max(per_token * tile_heads // heads_all, 1)
            tokens = max(_TILE_TARGET_BYTES // per_token, MIN_TILE_TOKENS)
            tokens = min(tokens, 2**17)
            if context_tokens is not None:  # the next turn may be longer than this one
                tokens = min(tokens, max(context_tokens, _LEAST_CONTEXT_TOKENS))
            while tokens >= MIN_TILE_TOKENS:
                yield tile_heads, tokens
                tokens //= 2


def _plan(
    shape: ModelShape,
    options: Options,
    device: str,
    batch: int,
    context_tokens: int | None,
    chunk_tokens: int,
    tile_heads: int,
    tile_tokens: int,
) -> Plan:
    copies = device != "cpu"
    page_tokens = max(min(PAGE_TOKENS, chunk_tokens // 2), 1)  # so that no chunk fits in a page
    return Plan(
        shape=shape,
        device=device,
        overlap=options.overlap,
        batch=batch,
        context_tokens=context_tokens,
        chunk_tokens=chunk_tokens,
        tile_heads=tile_heads,
        tile_tokens=tile_tokens,
        page_tokens=page_tokens,
        device_memory_bytes=options.device_memory_bytes,
        staging_bytes=copies
        * memory.staging_bytes(
            shape, tile_heads=tile_heads, tile_tokens=tile_tokens if copies else 0, batch=batch
        ),
        tail_bytes=copies * memory.tail_bytes(shape, page_tokens=page_tokens, batch=batch),
        chunk_page_bytes=copies
        * memory.chunk_page_bytes(shape, chunk_tokens=chunk_tokens, batch=batch),
        window_bytes=shape.window_bytes(chunk_tokens, batch),
        activation_bytes=memory.activation_bytes(
            shape, chunk_tokens=chunk_tokens, tile_heads=tile_heads, batch=batch
        ),
    )


def _smallest(
    shape: ModelShape, device: str, options: Options, batch: int, context_tokens: int | None
) -> Plan:
    return _plan(
        shape, options, device, batch, context_tokens, MIN_CHUNK_TOKENS, 1, MIN_TILE_TOKENS
    )


def _refusal(tried: Plan | None, smallest: Plan) -> MemoryPlanError:
    budget = smallest.device_memory_bytes or 0
    weights = smallest.shape.weights_bytes
    given = f"the device memory of {format_bytes(budget)}"
    if weights >= budget:
        return MemoryPlanError(
            f"{given} is below the weights of {smallest.shape.name}, {format_bytes(weights)}; "
            f"give at least {format_bytes(smallest.total_device_bytes)}"
        )
    if smallest.total_device_bytes > budget:
        return MemoryPlanError(
            f"{given} is too small: the smallest settings (chunk_tokens={smallest.chunk_tokens}, "
            f"tile_heads=1, tile_tokens={smallest.tile_tokens}) need "
            f"{format_bytes(smallest.total_device_bytes)}, of which weights "
            f"{format_bytes(weights)}"
        )
    needed = f", which need {format_bytes(tried.total_device_bytes)}" if tried else ""
    return MemoryPlanError(
        f"{given} does not hold the settings given{needed}; chunk_tokens={smallest.chunk_tokens}, "
        f"tile_heads=1, tile_tokens={smallest.tile_tokens} need "
        f"{format_bytes(smallest.total_device_bytes)}"
    )
