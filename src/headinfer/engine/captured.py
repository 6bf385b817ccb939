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

from headinfer.attend.native.token import token_function
from headinfer.attend.work import TokenWork
from headinfer.device.base import Capture, CaptureError
from headinfer.engine.chunk import Chunk
from headinfer.engine.drafting import DraftableTokens
from headinfer.engine.executor import PERFORM
from headinfer.engine.ready import Form
from headinfer.engine.streaming_step import StreamingStep, attend_kept
from headinfer.kv.ledger import Ledger
from headinfer.schedule.steps import SendHome

_Result = TypeVar("_Result")


class CapturableTokens(DraftableTokens, abc.ABC):
    """A cache's tokens, to which a captured step can add one in each row, or a few.

    A replay of one launch goes between `begin_step` and `end_step`, and nothing else that changes
    the tokens does. After `begin_step` alone they are as before. A replay in pieces needs neither,
    and adds the token by itself. Right before any of these is replayed, captured or run as it is
    captured, `prepare` is called.

    Attributes:
        captured: captured steps, by whatever tells them apart; forgotten when memory of the tokens
            goes.
    """

    def _begin(self) -> None:
        super()._begin()
        self.captured: dict[Hashable, Any] = {}
        self._capturing: Form | None = None

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
        self._streamed_captures[self._new_tokens] += not runs

    def replay(self, form: Form, capture: Capture[_Result]) -> _Result:
        """Replay a step."""
        with self.replaying(form):
            return capture.replay()

    @contextlib.contextmanager
    def replaying(self, form: Form) -> Iterator[None]:
        """Make the device ready for a step that is replayed within the `with` statement."""
        self.prepare(form)
        self._replaying = form is Form.STREAMED  # Ctrl-C may come before there is an event
        yield
        if form is Form.STREAMED:
            self._replayed, self._replaying = self._device.compute.record(), False
            if self._streaming is not None:
                self._streaming.ran()

    @property
    def is_capturing(self) -> bool:
        """Whether `attend` serves a step in the form that is captured."""
        return self._capturing is not None

    @contextlib.contextmanager
    def capturing(self, form: Form) -> Iterator[None]:
        """Have `attend` serve the new tokens of a step in the form that is captured.

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
        """Attend tokens by each track, and keep them, wherever their places are when this runs."""
        if chunks[0].padding is not None or chunks[0].tokens != self._new_tokens:
            raise CaptureError("the model masks tokens by itself")
        for chunk in chunks:
            chunk.have_place()  # for what is replayed, too
        if self._capturing is Form.IN_PIECES:
            self._attend_aside(layer_idx, chunks)
            return
        for track, chunk in enumerate(chunks, self._layers[layer_idx].first_track):
            streamed = None if self.drafting else self._ready[track].streamed
            if streamed is None:
                self._attend_at_place(track, chunk)
            elif self._capturing is Form.ONE_LAUNCH:
                attend_kept(self._device, streamed, chunk)
            else:
                assert self._streaming is not None
                self._streaming.attend(streamed, chunk)

    @abc.abstractmethod
    def _attend(self, ledger: Ledger, call: Chunk) -> None:
        """Attend new tokens of a track, and keep them."""

    def _attend_aside(self, layer_idx: int, chunks: Sequence[Chunk]) -> None:
        """Attend tokens by each track between two pieces of a capture."""
        engine = weakref.ref(self)  # which the engine's captures keep
        new_tokens = chunks[0].tokens
        checked = self._device.checks_accesses

        def attend() -> None:
            here = engine()
            assert here is not None
            with here.in_use():
                for ledger, chunk in zip(
                    here._layer(layer_idx, new_tokens).tracks, chunks, strict=True
                ):
                    chunk.waiting.clear()  # of a step that failed
                    if checked:
                        here._device.compute.reads(chunk.query, "attention between pieces")
                    here._attend(ledger, chunk)
                    if checked:
                        here._device.compute.writes(chunk.out, "attention between pieces")

        for chunk in chunks if checked else ():
            self._device.compute.writes(chunk.query, "the piece before")
        self._device.aside(attend)
        for chunk in chunks if checked else ():
            self._device.compute.reads(chunk.out, "the piece behind")

    def _attend_at_place(self, track: int, chunk: Chunk) -> None:
        """Attend a token by a launch that reads its place."""
        all_ready, memory = self._at_places()
        ready = all_ready[track]
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
            now = here._at_places()[0][track]
            here._pages.state_token(now.ledger.next_tile(now.extent))  # where that is checked
            kernels.decode(work)

        native = None if self._device.checks_accesses else token_function(kernels, work)
        self._device.launch(native or launch)

    def end_step(self, form: Form) -> None:
        """Count what a replay has added, send home what is due, and make ready again.

        So the next step has little to do before its replay, while the device is idle. What fails in
        that is done again by the next step, which raises it: this one is done. A step in pieces did
        all of it by itself. Behind several tokens nothing is made ready: some may be taken back.
        """
        if form is Form.IN_PIECES:
            return
        if self.drafting:
            self._count_draft()
            return
        if form is Form.STREAMED and self._streaming is not None:
            self._streaming.count_step()
        for ready in self._ready:
            ready.count(self._new_tokens)
        for ready in self._ready:
            self._executor.ledger = ready.ledger
            for step in ready.after:
                PERFORM[SendHome](self._executor, step)
        self._executor.send_late()
        if self._new_tokens > 1:
            return
        with contextlib.suppress(Exception):
            following = self._make_ready()
            if self._streaming is not None and following is not None and following.form is form:
                self._streaming.fill(self._streamed())

    def rest(self) -> None:
        """Sleep until the host has done its part of a step that was replayed."""
        if self._streaming is not None:
            self._streaming.rest()

    def steady(self) -> contextlib.AbstractContextManager[None]:
        """Have who attends which tokens stay, so that a step done again gives the same bits."""
        return self._step_balance.steady()

    def keeps_all(self, layers: int) -> bool:
        """Whether as many layers keep all their tokens, so that any can be taken back."""
        return len(self._layers) == layers and len(self._full) == len(self._ledgers)

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

    def _forget_memory(self) -> None:
        """Forget captures, and what they are made of, before the memory of tokens goes."""
        self.captured.clear()
        super()._forget_memory()
