"""What a step of one new token finds ready: places for the token, and the form that serves it."""

from collections.abc import Sequence

import torch

from headinfer.device.base import Device
from headinfer.engine.executor import PERFORM
from headinfer.engine.ready import Form, Ready, ReadyStep, StepMemory
from headinfer.engine.saving import SavableTokens
from headinfer.engine.stats import Stats
from headinfer.engine.streaming_step import StreamedTrack, StreamingStep
from headinfer.kv.ledger import Ledger
from headinfer.plan.plan import Plan
from headinfer.schedule import route
from headinfer.schedule.route import Pass, stays
from headinfer.schedule.steps import Attend, Decode, Keep, SendHome, Step, Where


class ReadyTokens(SavableTokens):
    """A cache's tokens, made ready for a step of one new token in each row.

    Args:
        device: where attention is computed.
        plan: sizes; its batch must be the batch of the tokens that come.
        dtype: of keys and values.
        stats: where bytes are counted.
        parked: whether to begin without an arena.
    """

    def __init__(
        self, device: Device, plan: Plan, dtype: torch.dtype, stats: Stats, *, parked: bool = False
    ) -> None:
        self._step_memory: StepMemory | None = None
        self._ready: list[Ready] = []
        # What `begin_step` returns if the tracks still are as noted beside it.
        self._ahead: tuple[tuple[object, ...], ReadyStep] | None = None
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
            if self._at_home(ledger, steps):
                continue
            if not (self._executor.source.lends and stays(ledger.held, steps)):
                return None
            form = Form.STREAMED
        return form

    def _at_home(self, ledger: Ledger, steps: Sequence[Step]) -> bool:
        """Whether a token is kept and attended in host memory, where all it sees is one tile."""
        if not any(isinstance(step, Keep) and step.where is Where.HOST for step in steps):
            return False
        whole = ledger.tokens < self.plan.tile_tokens and all(
            step.groups == 1 for step in steps if isinstance(step, Attend)
        )
        return whole and ledger.home_with_room() is not None

    def _ready_track(self, ledger: Ledger, steps: Sequence[Step], place: torch.Tensor) -> Ready:
        """Make a track ready for a new token."""
        executor = self._executor
        executor.ledger = ledger
        at = next(at for at, step in enumerate(steps) if not isinstance(step, SendHome))
        for step in steps[:at]:
            PERFORM[SendHome](executor, step)
        after = tuple(step for step in steps[at:] if isinstance(step, SendHome))
        decode = steps[at]
        home = ledger.home_with_room() if self._at_home(ledger, steps) else None
        if home is not None:
            return Ready(ledger, home, home=True)
        if isinstance(decode, Decode):
            return Ready(ledger, executor.with_room(decode.where), after)
        page = self._pages.page_with_room(ledger)
        return Ready(ledger, page, after, StreamedTrack.of(ledger, page, steps[at:], place))

    def _memory(self) -> StepMemory:
        """Return the memory from which captured steps read what changes."""
        if self._step_memory is None:
            self._step_memory = self._new_step_memory()
        return self._step_memory

    def _new_step_memory(self) -> StepMemory:
        heads = self.plan.batch * max(ledger.geometry.kv_heads for ledger in self._ledgers)
        return StepMemory(len(self._ledgers), heads, self._device.torch_device)

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

    def select(self, layer_idx: int, rows: Sequence[int]) -> None:
        """Rearrange a layer's rows; see `ChangeableTokens.select`."""
        self._ahead = None  # the new rows must be waited for, and nothing else tells of them
        super().select(layer_idx, rows)

    def _forget_memory(self) -> None:
        """Forget what is ready before the memory of tokens goes."""
        self._ready.clear()
        self._ahead = self._step_memory = None
        self._steps = 0
        self._streamed_captures = 0
        self._drop_streaming()
        super()._forget_memory()
