"""What the attention layers of one cache hold, in which memory, and how long.

What frees tokens of the host waits for the work in flight that touches them.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch

from headinfer.by_context import ByContext
from headinfer.device.base import Device, Edge, Event
from headinfer.disk.file import SpillFile
from headinfer.engine.balance import Balances, Settled
from headinfer.engine.build import build
from headinfer.engine.ending import settle_at_exit, uninterrupted
from headinfer.engine.executor import Executor
from headinfer.engine.host_attention import HostAttention
from headinfer.engine.layers import Layer
from headinfer.engine.reserving import ReservedTokens
from headinfer.engine.stats import Stats
from headinfer.engine.windows import WindowKeeper
from headinfer.errors import CacheStateError
from headinfer.kv.disk_place import DiskPlace
from headinfer.kv.ledger import Ledger
from headinfer.kv.pair import KV, Geometry
from headinfer.kv.place import HostPlace
from headinfer.plan.plan import Plan


class HeldTokens(ReservedTokens):
    """A cache's tokens in its attention layers: their ledgers and the device arena.

    Args:
        device: where attention is computed.
        plan: sizes; its batch must be the batch of the tokens that come.
        dtype: of keys and values.
        stats: where bytes are counted.
        shares: of the host, which caches before have settled on; by default of no cache.
        parked: whether to begin parked, for tokens that are copied or loaded.
        file: what lies below host memory; None where nothing does.

    Attributes:
        plan: its sizes.
        dtype: of keys and values.
        closed: whether the memory was given back.
        parked: whether it has no arena: it can be read, cropped, copied and saved, and not attended
            before it is given a plan.
        half_done: whether a change of all layers has begun and not ended, as after Ctrl-C.
        drafting: whether the tokens that come are drafts.
    """

    _balances: Balances

    def __init__(
        self,
        device: Device,
        plan: Plan,
        dtype: torch.dtype,
        stats: Stats,
        shares: ByContext[Settled] | None = None,
        *,
        parked: bool = False,
        file: SpillFile | None = None,
    ) -> None:
        self.plan = plan
        self.parked = parked
        self.dtype = dtype
        self.closed = False
        self.half_done = False
        self.drafting = False
        self._device = device
        self._stats = stats
        self._shares: ByContext[Settled] = ByContext() if shares is None else shares
        # Whether the model's attention leaves any to the host; None until a pass tells.
        self._host_helps: bool | None = None
        self._replayed: Event | None = None  # the last step that had all streams in one capture
        self._replaying = False  # whether one may be under way that has no such event
        self._begin()
        # What the place holds must not hold the engine: it is to die with its cache.
        self._place = host = HostPlace(device) if file is None else DiskPlace(device, file, stats)
        self._layers: list[Layer] = []
        self._ledgers: list[Ledger] = []  # of all tracks
        geometries: dict[tuple[int, int, int], Geometry] = {}  # of layers alike
        for shape in plan.shape.attention_layers:
            tracks = []
            for track in shape.tracks:
                sizes = track.kv_heads, track.key_dim, track.value_dim
                if sizes not in geometries:
                    geometries[sizes] = Geometry(plan.batch, *sizes, dtype)
                place = host, track.window_tokens or None, track.sink_tokens, track.host_format
                tracks.append(Ledger(geometries[sizes], *place))
            self._layers.append(Layer(shape, tracks, len(self._ledgers), device.torch_device))
            self._ledgers += tracks
        self._full = [ledger for ledger in self._ledgers if ledger.track.window_tokens is None]
        self._windows = WindowKeeper(device, plan.page_tokens)
        self._choose_share()
        self._choose_blocks(self.plan)
        self._host = HostAttention(self._device, self._stats, self._balances)
        if not parked:
            self._build()
        settle_at_exit(self)

    def _begin(self) -> None:
        """Begin with what there is before any token, and before any memory."""

    def _forget_memory(self) -> None:
        """Forget what refers to the memory of the tokens, before that goes."""

    def _build(self) -> None:
        """Take what the plan gives the engine."""
        self._choose_share()
        self._choose_blocks(self.plan)
        self._host = HostAttention(self._device, self._stats, self._balances)
        sizes = self.plan.sizes
        source, self._pages, self._arena_bytes, self._raw = build(
            self._device, self.plan, sizes, self._full, self._stats, self._raw
        )
        self._executor = Executor(source, self._pages, self._windows, self._host, sizes)

    def _choose_share(self) -> None:
        self._host_helps = None if self.plan.host_share else False
        fixed = not self.plan.host_share_adapts
        # What was learned is kept, where anything was.
        if fixed or not hasattr(self, "_balances") or self._balances.fixed:
            who = self.plan.batch, self.dtype, self.plan.shape.host_format
            self._balances = Balances(
                self.plan.host_share_at, fixed=fixed, kept=self._shares, who=who
            )

    def _choose_blocks(self, plan: Plan) -> None:
        """Have host memory above a disk be in a plan's blocks."""
        blocks = plan.disk_block_tokens, plan.disk_host_blocks
        self._place.choose_sizes(*blocks, plan.disk_staging_bytes)

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """Have the device be this thread's current one in the `with` statement."""
        return self._device.in_use()

    @property
    def device(self) -> Device:
        """Where the layers are attended."""
        return self._device

    def torch_device(self, _layer_idx: int) -> torch.device:
        """Return where a layer's tokens are attended."""
        return self._device.torch_device

    def host_share_at(self, new_tokens: int) -> float:
        """Return the share of the tokens beside the residents that the host attends, as it is now.

        Args:
            new_tokens: of a pass.
        """
        return self._balances.share(new_tokens)

    def has_settled_at(self, new_tokens: int) -> bool:
        """Return whether the host's share of passes of so many new tokens changes seldom by now."""
        return self._balances.settled(new_tokens)

    def tokens(self, layer_idx: int) -> int:
        """Return the tokens a layer holds."""
        host = self._host
        if self.closed or host.pending or host.failure is not None or self._place.under_way:
            self._check_open()
        return self._layers[layer_idx].tokens

    @property
    def held_tokens(self) -> int:
        """The tokens of its last layer, in whatever state it is: the fewest while a call runs."""
        return self._layers[-1].tokens if self._layers else 0

    def lengths(self) -> list[int]:
        """Return the tokens that each layer holds.

        Raises:
            CacheStateError: the cache was closed, or a change of it was interrupted.
        """
        self._check_open()
        if self.interrupted:
            raise CacheStateError(
                "a change of this cache was interrupted, so its layers may no longer hold the same "
                "tokens; call reset() on it or use a new cache"
            )
        return [layer.tokens for layer in self._layers]

    @property
    def interrupted(self) -> bool:
        """Whether a change has begun and not ended, so that only closing is left to do."""
        uneven = any(len(layer.tracks) > 1 and layer.uneven for layer in self._layers)
        return uneven or self.half_done or any(ledger.half_done for ledger in self._ledgers)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Mark the engine as half done until the `with` statement ends well."""
        before, self.half_done = self.half_done, True
        yield
        self.half_done = before

    def _layer(self, layer_idx: int, new_tokens: int) -> Layer:
        """Return a layer, with host memory for new tokens."""
        if self.closed or self._host.pending or self._host.failure is not None:
            self._check_computed()
        layer = self._layers[layer_idx]
        for ledger in layer.tracks:
            if ledger.track.window_tokens is None and not self.drafting:
                self._reserve(ledger, new_tokens)
        return layer

    def _check(self, layer_idx: int, new: KV, query: torch.Tensor) -> Layer:
        """Return a layer, with host memory; refuse tokens that do not fit the cache."""
        keys, values = new
        batch, kv_heads, tokens, key_dim = keys.shape
        layer = self._layer(layer_idx, tokens)
        geometry, given = layer.tracks[0].geometry, (batch, kv_heads, key_dim, values.shape[3])
        wanted = (geometry.batch, layer.kv_heads, geometry.key_dim, geometry.value_dim)
        dtypes = (keys.dtype, values.dtype, query.dtype)
        if given != wanted or dtypes != (geometry.dtype,) * 3:
            names = ", ".join(sorted({str(dtype) for dtype in dtypes}))
            raise CacheStateError(
                f"layer {layer_idx} was given keys and values of (batch, kv_heads, key_dim, "
                f"value_dim) {given} in {names}, but this cache holds {wanted} in "
                f"{geometry.dtype}; use a new cache"
            )
        return layer

    def check(self) -> None:
        """Raise what the host's attention failed with since the last check.

        Work that is pending is not looked at: what compute has done is sound if compute was waited
        for before this.
        """
        self._host.check()

    def _check_computed(self) -> None:
        if self.closed:
            raise CacheStateError("this cache was closed; make another with offload.new_cache()")
        self._host.check()

    def _check_open(self) -> None:
        self._check_computed()
        self._place.check()

    def check_no_drafts(self) -> None:
        """Refuse what would read or change the cache between drafts.

        Raises:
            CacheStateError: it is drafting.
        """
        if self.drafting:
            raise CacheStateError(
                "this cache has drafts in it, which are no part of its tokens; leave drafting() "
                "before it is read or changed"
            )

    def clear(self) -> None:
        """Forget all tokens and free the host memory; the arena stays.

        Raises:
            Exception: what the host's attention failed with, and nobody heard of; after all else.
        """
        if not self.closed:
            self.check_no_drafts()
            self._settle()
            self._empty()
        self._check_open()

    def _empty(self) -> None:
        """Forget all tokens, with no work in flight."""
        self._forget_memory()
        for ledger in self._ledgers:
            ledger.clear()
        self._place.forget()
        if not self.parked:
            self._executor.forget_late()
        if self._raw is not None:
            self._raw.forget()
        self._expected_tokens = 0
        self.half_done = self.drafting = False

    def close(self) -> None:
        """Free all memory, once no copy touches it any more; may be called again.

        Raises:
            Exception: what the host's attention failed with, and nobody heard of; after all else.
        """
        if self.closed:
            return
        self._settle()
        self._empty()
        self._leave_arena()
        self._abandon()
        self._host.check()

    def _leave_arena(self) -> None:
        """Let go of what uses the arena, where there is one."""
        if not self.parked:
            del self._executor, self._pages
            self._host.free()
            self._place.free()

    def _abandon(self) -> None:
        """Free what is left, with no copy in flight; the cache is closed after this."""
        self.closed = True
        self._arena_bytes, self._raw = 0, None
        self._forget_memory()
        self._host.free()
        for ledger in self._ledgers:
            ledger.clear()
            ledger.drop_device()
        self._place.forget()

    def __del__(self, _is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """Wait for the work in flight before the memory it touches goes away."""
        if not _is_finalizing():  # else `settle_at_exit` did
            uninterrupted(self._let_go)

    def _let_go(self) -> None:
        """Leave host memory that a copied cache shares to that cache."""
        if self.parked or hasattr(self, "_executor"):
            self.settle()
            self._forget_memory()
            for ledger in self._full:
                ledger.clear()

    def settle(self) -> None:
        """Wait until no work touches the memory; may be called again, and when closed."""
        if hasattr(self, "_executor"):
            self._settle()
            self._host.free()

    def _settle(self) -> None:
        """Wait until no work touches host memory, and forget what was fetched ahead."""
        if self._device.tiles_are_views or self.parked:
            return
        # Our streams know nothing of what a capture does on them.
        if self._replaying:
            self._device.synchronize()
            self._replaying = False
        if self._replayed is not None:
            self._replayed.synchronize(Edge.HOST_SETTLED)
            self._replayed = None
        device = self._device  # whose compute reads host memory, too, where that is packed
        compute = (device.compute,) if self.plan.shape.packs else ()
        for stream in (device.copy_in, device.copy_out, device.host_work, *compute):
            stream.record().synchronize(Edge.HOST_SETTLED)
        self._host.forget()
        self._executor.source.drop()
