"""Attention in decode steps that are captured once, and replayed for the tokens that follow.

Where a layer's attention is one launch, its kernel reads from memory where the new token goes.
Nothing in such a step depends on how many tokens there are. What does is done between replays:
copies to the host, and counting. Where tokens are streamed, or attended by the host, that is in the
capture, too, with what other streams do for it (`StreamingStep`).

Elsewhere attention stands beside the capture, which is in pieces then: what the model does between
one layer's attention and the next one's.
"""

import abc
import contextlib
import weakref
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from headinfer.attend.work import TokenWork
from headinfer.device.base import Capture, CaptureError, Device
from headinfer.engine.chunk import Chunk
from headinfer.engine.executor import PERFORM
from headinfer.engine.ready import Form, Ready, ReadyStep, StepMemory
from headinfer.engine.saving import SavableTokens
from headinfer.engine.stats import Stats
from headinfer.engine.streaming_step import StreamedTrack, StreamingStep
from headinfer.kv.ledger import Ledger
from headinfer.plan.plan import Plan
from headinfer.schedule import route
from headinfer.schedule.route import Pass, stays
from headinfer.schedule.steps import Decode, SendHome, Step

_Result = TypeVar("_Result")


class CapturableTokens(SavableTokens, abc.ABC):
    """A cache's tokens, to which a captured step can add one in each row.

    A replay of one launch goes between `begin_step` and `end_step`, and nothing else that changes
    the tokens does. After `begin_step` alone they are as before. A replay in pieces needs neither,
    and adds the token by itself. Right before any of these is replayed, captured or run as it is
    captured, `prepare` is called.

    Args:
        device: where attention is computed.
        plan: sizes; its batch must be the batch of the tokens that come.
        dtype: of keys and values.
        stats: where bytes are counted.
        parked: whether to begin without an arena.

    Attributes:
        captured: captured steps, by whatever tells them apart; forgotten when memory of the tokens
            goes.
    """

    def __init__(
        self, device: Device, plan: Plan, dtype: torch.dtype, stats: Stats, *, parked: bool = False
    ) -> None:
        self.captured: dict[Hashable, Any] = {}
        self._step_memory: StepMemory | None = None
        self._ready: list[Ready] = []
        # What `begin_step` returns if the tracks still are as noted beside it.
        self._ahead: tuple[tuple[object, ...], ReadyStep] | None = None
        self._capturing: Form | None = None
        self._streaming: StreamingStep | None = None  # from the first such step on
        self._steps = 0  # that were begun since the first streamed one was captured
        self._streamed_captures = 0
        self._dropped = 0  # times that captures lost the flags which they raise and await
        super().__init__(device, plan, dtype, stats, parked=parked)

    def begin_step(self) -> ReadyStep | None:
        """Make ready for a step of one new token, and write to memory where the token goes.

        Returns:
            None where a step is captured in pieces alone; nothing was done then but to reserve host
            memory.

        Raises:
            CacheStateError: the cache was closed.
        """
        self._check_open()
        for ledger in self._full:
            self._reserve(ledger, 1)  # memory that came within a capture would come in each replay
        self._steps += self._streamed_captures > 0
        failed = self._streaming is not None and self._streaming.failed
        if self._ahead is not None and self._ahead[0] == self._state() and not failed:
            return self._ahead[1]
        ready = self._make_ready()
        self._balance.one_launch = ready is not None and ready.form is Form.STREAMED
        return ready

    @property
    def may_capture_streamed(self) -> bool:
        """Whether to capture a streamed step: not for a share that changes, nor often.

        The second one comes when it will: the first may have been made right before a change.
        """
        due = 2 + self._steps // route.STEADY_TOKENS
        return self._balance.settled and self._streamed_captures < due

    @property
    def _share(self) -> float:
        """Share of the tokens beside the residents that the host attends in the next step."""
        return self._balance.share if self._host_helps else 0.0

    @property
    def sends_home(self) -> bool:
        """Whether a step of one new token moves tokens, which `take_back` leaves where they are.

        Attention would then go through them in another order, and give other bits.
        """
        return any(isinstance(step, SendHome) for steps in self._next_steps() for step in steps)

    def _next_steps(self) -> list[tuple[Step, ...]]:
        """Return what each track does with one new token."""
        executor, host_share = self._executor, self._share
        return [
            executor.steps_of(ledger, ledger.tokens, Pass.FORWARD, 1, host_share).steps
            for ledger in self._ledgers
        ]

    def _state(self) -> tuple[object, ...]:
        """Return what changes where a token's place does, or who attends what."""
        return self._share, *(
            # A window's tokens move when it begins anew, however many there are. Another extent may
            # begin where one that was emptied began.
            (ledger.tokens, ledger.version, tail, 0 if tail is None else tail.start)
            for ledger in self._ledgers
            for tail in (ledger.tail,)
        )

    def _make_ready(self) -> ReadyStep | None:
        """Do what `begin_step` says."""
        self._ahead = None
        tracks = self._next_steps()
        form = self._form(tracks)
        if form is None:
            return None
        self._ready = [
            self._ready_track(ledger, steps, place)
            for ledger, steps, place in zip(
                self._ledgers, tracks, self._memory().places, strict=True
            )
        ]
        self._memory().write(self._ready)
        self._check_streaming()
        reads = (self._dropped, *(each for ready in self._ready for each in ready.reads))
        step = ReadyStep(form, reads)
        self._ahead = self._state(), step
        return step

    def _form(self, tracks: Sequence[Sequence[Step]]) -> Form | None:
        """Return the best form for what each track does; None for pieces alone."""
        form = Form.ONE_LAUNCH
        for ledger, steps in zip(self._ledgers, tracks, strict=True):
            if all(isinstance(step, (Decode, SendHome)) for step in steps):
                continue
            if not (self._executor.source.lends and stays(ledger.held, steps)):
                return None
            form = Form.STREAMED
        return form

    def _ready_track(self, ledger: Ledger, steps: Sequence[Step], place: torch.Tensor) -> Ready:
        """Make a track ready for a new token."""
        executor = self._executor
        executor.ledger = ledger
        at = next(at for at, step in enumerate(steps) if not isinstance(step, SendHome))
        for step in steps[:at]:
            PERFORM[SendHome](executor, step)
        after = tuple(step for step in steps[at:] if isinstance(step, SendHome))
        decode = steps[at]
        if isinstance(decode, Decode):
            return Ready(ledger, executor.with_room(decode.where), after)
        page = self._pages.page_with_room(ledger)
        return Ready(ledger, page, after, StreamedTrack.of(ledger, page, steps[at:], place))

    def _memory(self) -> StepMemory:
        """Return the memory from which captured steps read what changes."""
        if self._step_memory is None:
            heads = self.plan.batch * max(ledger.geometry.kv_heads for ledger in self._ledgers)
            where = self._device.torch_device
            self._step_memory = StepMemory(len(self._ledgers), heads, where)
        return self._step_memory

    def prepare(self, form: Form, *, runs: bool = True) -> None:
        """Make the device ready for a step that `begin_step` made ready, right before it comes.

        Args:
            form: in which it comes.
            runs: whether it is enqueued, and not captured.
        """
        if form is not Form.STREAMED:
            return
        self._check_streaming()
        if self._streaming is None:
            self._streaming = StreamingStep(
                self._device, self._executor.source, self._host, self._stats
            )
        self._streaming.prepare(self._streamed(), runs=runs)
        self._streamed_captures += not runs

    def _check_streaming(self) -> None:
        """Drop what streamed steps share where it does not serve those that are ready."""
        if self._streaming is not None and not self._streaming.serves(self._streamed()):
            self._device.synchronize()
            self._drop_streaming()

    def _drop_streaming(self) -> None:
        """Let go of what streamed steps share; no capture of one is replayed after that."""
        if self._streaming is not None:
            self._streaming.end()
            self._streaming = None
            self._dropped += 1

    def _streamed(self) -> list[StreamedTrack]:
        """Return the tracks that are ready and take more than a launch."""
        return [ready.streamed for ready in self._ready if ready.streamed is not None]

    def replay(self, form: Form, capture: Capture[_Result]) -> _Result:
        """Replay a step."""
        self.prepare(form)
        self._replaying = form is Form.STREAMED  # Ctrl-C may come before there is an event
        result = capture.replay()
        if form is Form.STREAMED:
            self._replayed, self._replaying = self._device.compute.record(), False
            if self._streaming is not None:
                self._streaming.ran()
        return result

    @contextlib.contextmanager
    def capturing(self, form: Form) -> Iterator[None]:
        """Have `attend` serve one new token a row in the form that is captured.

        But in pieces it does by what `begin_step` made ready, and counts no token. It raises
        `CaptureError` where it cannot.
        """
        self._capturing = form
        steps: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if form is Form.STREAMED and self._streaming is not None:
            steps = self._streaming.step(self._streamed())
        try:
            with steps:
                yield
        finally:
            self._capturing = None

    def _attend_captured(self, layer_idx: int, chunks: Sequence[Chunk]) -> None:
        """Attend a token by each track, and keep it, wherever its place is when this runs."""
        if chunks[0].padding is not None or chunks[0].tokens != 1:
            raise CaptureError("the model masks tokens by itself")
        if self._capturing is Form.IN_PIECES:
            self._attend_aside(layer_idx, chunks)
            return
        for track, chunk in enumerate(chunks, self._layers[layer_idx].first_track):
            streamed = self._ready[track].streamed
            if streamed is None:
                self._attend_at_place(track, chunk)
            else:
                assert self._streaming is not None
                self._streaming.attend(streamed, chunk)

    @abc.abstractmethod
    def _attend(self, ledger: Ledger, call: Chunk) -> None:
        """Attend new tokens of a track, and keep them."""

    def _attend_aside(self, layer_idx: int, chunks: Sequence[Chunk]) -> None:
        """Attend a token by each track between two pieces of a capture."""
        engine = weakref.ref(self)  # which the engine's captures keep

        def attend() -> None:
            here = engine()
            assert here is not None
            for ledger, chunk in zip(here._layer(layer_idx, 1).tracks, chunks, strict=True):
                chunk.waiting.clear()  # of a step that failed
                here._attend(ledger, chunk)

        self._device.aside(attend)

    def _attend_at_place(self, track: int, chunk: Chunk) -> None:
        """Attend a token by a launch that reads its place."""
        memory, ready = self._memory(), self._ready[track]
        extent, sink_tokens = ready.extent, ready.ledger.track.sink_tokens
        tile, place = extent.tile(extent.start, extent.limit), memory.places[track]
        work = TokenWork(
            *(chunk.query, chunk.new, tile, chunk.scale, chunk.out, chunk.sinks),
            *(sink_tokens, place, memory.counters),
        )
        engine, kernels = weakref.ref(self), chunk.kernels  # which the engine's captures keep

        def launch() -> None:
            here = engine()
            assert here is not None
            now = here._ready[track]
            here._pages.state_token(now.ledger.next_tile(now.extent))  # where that is checked
            kernels.decode(work)

        self._device.launch(launch)

    def end_step(self, form: Form) -> None:
        """Count the token that a replay has added, send home what is due, and make ready again.

        So the next step has little to do before its replay, while the device is idle. What fails in
        that is done again by the next step, which raises it: this one is done. A step in pieces did
        all of it by itself.
        """
        if form is Form.IN_PIECES:
            return
        if form is Form.STREAMED and self._streaming is not None:
            self._streaming.count_step()
        for ready in self._ready:
            ready.ledger.extend(ready.extent, 1)
        for ready in self._ready:
            self._executor.ledger = ready.ledger
            for step in ready.after:
                PERFORM[SendHome](self._executor, step)
        with contextlib.suppress(Exception):
            following = self._make_ready()
            if self._streaming is not None and following is not None and following.form is form:
                self._streaming.fill(self._streamed())
        if self._streaming is not None:
            self._streaming.rest()

    def steady(self) -> contextlib.AbstractContextManager[None]:
        """Have who attends which tokens stay, so that a step done again gives the same bits."""
        return self._balance.steady()

    def take_back(self, lengths: Sequence[int]) -> None:
        """Keep so many tokens of each layer, where a step has added to some.

        What the host's attention failed with stays, for the next call to raise.
        """
        for layer, tokens in zip(self._layers, lengths, strict=True):
            for ledger in layer.tracks:
                added = ledger.tokens - tokens
                if added > 0:
                    if ledger.track.window_tokens is None and added > ledger.tail_tokens:
                        self._settle()
                    ledger.crop(tokens)

    def select(self, layer_idx: int, rows: Sequence[int]) -> None:
        """Rearrange a layer's rows; see `ChangeableTokens.select`."""
        self._ahead = None  # the new rows must be waited for, and nothing else tells of them
        super().select(layer_idx, rows)

    def _forget_memory(self) -> None:
        """Forget captures, and what they are made of, before the memory of tokens goes."""
        self.captured.clear()
        self._ready.clear()
        self._ahead = self._step_memory = None
        self._steps = 0
        self._streamed_captures = 0
        self._drop_streaming()
