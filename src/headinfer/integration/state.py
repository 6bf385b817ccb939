"""What is behind a cache's offloaded layers: one engine, made when the first tokens come."""

import contextlib
from collections.abc import Sequence

import torch

from headinfer.engine.engine import Engine
from headinfer.engine.parted import CacheEngine
from headinfer.engine.readout import Part
from headinfer.errors import CacheStateError, MemoryPlanError
from headinfer.integration.answers import AnswerPlans
from headinfer.integration.cache_host import CacheHost
from headinfer.integration.engine_memory import check_room, engine_with_memory, make_room
from headinfer.integration.pending import Pending
from headinfer.integration.turns import in_turn
from headinfer.plan.growing import outgrows, with_growth
from headinfer.units import counted, counted_tokens, format_bytes


def _unlike(engine: CacheEngine, batch: int, dtype: torch.dtype) -> str:
    """Say what a call asks for that a cache with tokens in it is not for."""
    if engine.plan.batch != batch:
        held = counted(engine.plan.batch, "row")
        return f"this cache holds {held} and was given {batch}; use a new cache"
    return (
        f"this cache was begun in {engine.dtype} and cannot go on in {dtype}; call the model under "
        "the same torch.autocast as before, or use a new cache"
    )


class OffloadedState:
    """A state behind a cache's offloaded layers; its engine is made when the first tokens come.

    The layers refer to this and never to the cache. So dropping the cache frees its memory at once,
    without waiting for the garbage collector.

    Attributes:
        host: the attachment.
        functions: its attention functions.
        turns: taken by whatever changes the engine.
        engine: None before the first tokens.
        closed: whether the cache was closed.
        max_tokens: tokens to reserve host memory for; None to go by the prompts.
    """

    engine: CacheEngine | None = None  # also where `__init__` was interrupted

    def __init__(self, host: CacheHost, max_tokens: int | None) -> None:
        self.host = host
        self.functions = host.functions
        self.turns = host.functions.turns
        self.closed = False
        self.max_tokens = max_tokens
        self._answers = AnswerPlans(host.answers)
        self._call = 1, 0  # rows and new tokens of the call that was last prepared for
        self._computed_dtype: torch.dtype | None = None  # where keys are not of the model's dtype

    def changing(self) -> contextlib.AbstractContextManager[None]:
        """Mark the cache as half done until a change of several layers has ended well."""
        return contextlib.nullcontext() if self.engine is None else self.engine.changing()

    def check_open(self) -> None:
        """Refuse a cache that was closed, or whose model was detached.

        Raises:
            CacheStateError: it was.
        """
        if self.closed or (self.engine is not None and self.engine.closed):
            raise CacheStateError("this cache was closed; make another with offload.new_cache()")

    @in_turn
    def tokens(self, layer_idx: int) -> int:
        """Return the tokens an offloaded layer holds."""
        if self.engine is not None and not self.closed:
            return self.engine.tokens(layer_idx)
        self.check_open()
        return 0

    @in_turn
    def lengths(self) -> list[int] | None:
        """Return the tokens that each of our layers holds; None before the first tokens."""
        self.check_open()
        return self.engine.lengths() if self.engine else None

    @property
    def drafting(self) -> bool:
        """Whether the tokens that come are drafts."""
        return self.engine is not None and self.engine.drafting

    @property
    def parked(self) -> bool:
        """Whether there is an engine, and it is parked."""
        return self.engine is not None and self.engine.parked

    @property
    def chunk_tokens(self) -> int | None:
        """Tokens of a prefill chunk; None while there is no engine."""
        return self.engine.plan.chunk_tokens if self.engine else None

    @in_turn
    def prepare(self, batch: int, new_tokens: int, *, short: bool = False) -> None:
        """Make the engine for the first tokens; make sure of host memory for these and the rest.

        Args:
            batch: rows.
            new_tokens: tokens to come in each row, in this call of the model.
            short: whether a plan for answers has the memory for the call.

        Raises:
            CacheStateError: the cache was closed, or holds another number of rows or dtype; or no
                such tokens can be drafted.
            MemoryPlanError: the device or the host memory is too small.
            DiskError: what failed to be written to the disk fails again.
        """
        self.check_open()
        if self.engine is not None and self.engine.drafting:
            self.engine.check_draft(batch, new_tokens)
            return
        self._call = batch, new_tokens
        held = self.tokens(0)
        wanted = max(held + new_tokens, self.max_tokens or 0)
        dtype, engine = self.host.kv_dtype(self._computed_dtype), self.engine
        if engine is not None and (engine.plan.batch, engine.dtype) != (batch, dtype):
            if held:
                raise CacheStateError(_unlike(engine, batch, dtype))
            self.drop_engine()
        if self.engine is None:
            self.engine = self._new_engine(batch, wanted, dtype, "the KV cache")
            return
        self._wake(wanted)
        more = self.engine.missing_bytes(wanted)
        if more > 0 or self.engine.plan.ranks_differ:  # all ranks check, or none does
            make_room(self.host, self.engine, wanted)
            self.engine.expect(wanted)
        if outgrows(self.engine.plan, wanted):
            plan = self.host.plan_for(batch, with_growth(wanted), replacing=self.engine)
            self.engine.replan(plan)
        self.engine.go_on()
        self._answers.begin_call(self.engine, new_tokens, short=short)

    @in_turn
    def begin_answer(self) -> None:
        """Change to a plan for answers now, as decode steps do by themselves once that pays.

        Nothing changes where there is none, or where others have the memory.
        """
        if self.engine is not None and not (self.engine.parked or self.engine.drafting):
            self._answers.begin(self.engine)

    def _wake(self, tokens: int) -> None:
        """Give a parked engine an arena, for so many tokens."""
        engine = self.engine
        if engine is not None and engine.parked:
            batch, known = engine.plan.batch, self.max_tokens is not None
            wanted = tokens if known else with_growth(tokens)
            engine.replan(self.host.plan_for(batch, wanted, replacing=engine))

    @in_turn
    def park(self) -> None:
        """Give up the device's memory but for windows, until tokens come."""
        self.check_open()
        self._check_none_pending()
        if self.engine is not None:
            self.engine.park()

    def _new_engine(
        self,
        batch: int,
        tokens: int,
        dtype: torch.dtype,
        what: str,
        sharing: CacheEngine | None = None,
    ) -> CacheEngine:
        """Return an engine that will hold `tokens` tokens; see `engine_with_memory`."""
        grows = self.max_tokens is None
        return engine_with_memory(
            self.host, batch, tokens, dtype, what, grows=grows, sharing=sharing
        )

    def update(
        self,
        layer_idx: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        window_tokens: int | None,
        in_turn: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new tokens and hand them back for the attention call that follows."""
        if self.engine is None:  # the model was not called through its own forward
            self.prepare(keys.shape[0], keys.shape[2])
        assert self.engine is not None
        if keys.dtype != self.engine.dtype and not self.tokens(0):
            self._computed_dtype = keys.dtype  # under autocast it may be just the same
            self.prepare(*self._call)
        self.functions.expect(Pending(self.engine, layer_idx, keys, values, window_tokens, in_turn))
        return keys, values

    @in_turn
    def read(self, layer_idx: int, part: Part) -> torch.Tensor | None:
        """Return a copy of an offloaded layer's keys or values; None before the first tokens.

        Raises:
            CacheStateError: the cache was closed, or its newest tokens were not attended yet.
            MemoryPlanError: there is no memory for it.
        """
        self.check_open()
        if self.engine is None:
            return None
        self._check_none_pending()
        if not self.tokens(layer_idx):
            return None
        # Whoever reads keys and values mostly joins them with others: that is a second copy.
        needed_bytes = 2 * self.engine.read_bytes(layer_idx, part)
        left = self.host.tensor_bytes_left(layer_idx)
        if needed_bytes > left:
            tokens = counted_tokens(self.tokens(layer_idx))
            raise MemoryPlanError(
                f"the {part} of {tokens} in offloaded layer {layer_idx}, handed out and "
                f"copied once, need {format_bytes(needed_bytes)}, and {format_bytes(left)} can be "
                "had; free memory or read a shorter cache"
            )
        return self.engine.read(layer_idx, part)

    @in_turn
    def copy_from(self, other: "OffloadedState", *, parked: bool = False) -> None:
        """Hold what another cache of the same attachment holds.

        Host memory is shared until one of the two changes what both hold. Room is made sure of for
        the time when all of it was changed.

        Args:
            other: may be in use between its calls.
            parked: whether to do without an arena until tokens come. It takes no memory then.

        Raises:
            CacheStateError: the other was closed, or its newest tokens were not attended yet.
            MemoryPlanError: the device or the host memory is too small for a second cache.
        """
        other.check_open()
        other._check_none_pending()
        held = other.tokens(0)
        if other.engine is None or not held:
            return
        plan, dtype = other.engine.plan, other.engine.dtype
        if parked:
            engine = self.host.make_engine(plan, dtype, parked=True)
        else:
            wanted = max(held, self.max_tokens or 0)
            engine = self._new_engine(
                plan.batch, wanted, dtype, "a copy of the KV cache", other.engine
            )
        try:
            for part, source in zip(engine.parts, other.engine.parts, strict=True):
                with part.in_use():
                    part.copy_from(source)
        except BaseException:
            engine.close()
            raise
        self.engine, self._computed_dtype = engine, other._computed_dtype

    @in_turn
    def begin_loading(
        self, batch: int, tokens: int, dtype: torch.dtype, computed_dtype: str | None
    ) -> Engine:
        """Return a new engine for tokens that were saved.

        Args:
            batch: rows.
            tokens: in each row.
            dtype: of keys and values.
            computed_dtype: what `computed_dtype` was.

        Raises:
            MemoryPlanError: the device or the host memory is too small.
        """
        self.check_open()
        wanted = max(tokens, self.max_tokens or 0)
        engine = self.engine = self._new_engine(batch, wanted, dtype, "the saved KV cache")
        self._computed_dtype = None if computed_dtype is None else getattr(torch, computed_dtype)
        assert isinstance(engine, Engine), "a model that is split has no sessions"
        return engine

    @property
    def computed_dtype(self) -> str | None:
        """The dtype in which the model computes keys; None where that is its own."""
        return str(self._computed_dtype).removeprefix("torch.") if self._computed_dtype else None

    def check_savable(self) -> Engine:
        """Return the engine, whose tokens are all there.

        Raises:
            CacheStateError: the cache was closed, is empty, or its newest tokens were not attended.
        """
        self.check_open()
        self._check_none_pending()
        if self.engine is None or not self.tokens(0):
            raise CacheStateError("this cache holds no tokens, so there is nothing to save")
        assert isinstance(self.engine, Engine), "a model that is split has no sessions"
        return self.engine

    def _check_none_pending(self) -> None:
        pending = self.functions.pending
        if pending is not None and pending.engine is self.engine:
            raise CacheStateError(
                "this cache was given tokens that were not attended yet: it can be read or copied "
                "after the model's call"
            )

    @in_turn
    def select_rows(self, rows: Sequence[int]) -> None:
        """Make row `i` of every layer what row `rows[i]` was; the number of rows may change."""
        self.check_open()
        self._wake(max(self.tokens(0), self.max_tokens or 0))
        if self.engine is not None and self.tokens(0):
            tokens = max(self.tokens(0), self.max_tokens or 0)
            plan = self.host.plan_for(len(rows), tokens, replacing=self.engine)
            more = plan.kv_host_bytes(tokens) - self.engine.taken_host_bytes
            check_room(self.host, more, tokens, self.engine.plan)
            self.engine.select_all(rows, plan)

    @in_turn
    def close(self) -> None:
        """Free all memory; the cache cannot be used any more."""
        self.closed = True
        self.drop_engine()

    def drop_engine(self) -> None:
        """Close the engine, if there is one; another is made when tokens come."""
        engine, self.engine = self.engine, None
        if engine is not None:
            engine.close()

    def __del__(self) -> None:
        """Let the engine die in a turn: its last work is done on streams that all caches share."""
        if self.engine is not None:
            engine, self.engine = [self.engine], None
            self.turns.retire(engine)
