"""What a step of a few new tokens finds ready: places for them, and the form that serves it."""

import collections
from collections.abc import Sequence

import torch

from headinfer.engine.balance import Balance
from headinfer.engine.executor import PERFORM
from headinfer.engine.ready import Form, Ready, ReadyStep, StepMemory
from headinfer.engine.saving import SavableTokens
from headinfer.engine.streaming_step import StreamedTrack, StreamingStep
from headinfer.kv.ledger import Ledger
from headinfer.schedule import route
from headinfer.schedule.route import Pass, keeps_in_page, stays
from headinfer.schedule.steps import Attend, Decode, Keep, SendHome, Step, Where


class ReadyTokens(SavableTokens):
    """A cache's tokens, made ready for a step of one new token in each row, or of a few."""

    def _begin(self) -> None:
        super()._begin()
        self._new_tokens = 1  # of the step that was begun last, in each row
        self._step_memory: dict[int, StepMemory] = {}  # by new tokens
        self._ready: list[Ready] = []
        # What `begin_step` returns if the tracks still are as noted beside it.
        self._ahead: tuple[tuple[object, ...], ReadyStep] | None = None
        self._streaming: StreamingStep | None = None  # from the first such step on
        self._stepped_tokens = 0  # of steps that were begun since a streamed one was captured
        self._streamed_captures: collections.Counter[int] = collections.Counter()  # by new tokens
        self._dropped = 0  # times that captures lost the flags which they raise and await

    def begin_step(self, new_tokens: int = 1) -> ReadyStep | None:
        """Make ready for a step of a few new tokens, and write to memory where they go.

        Args:
            new_tokens: of each row.

        Returns:
            None where a step is captured in pieces alone; nothing was done then but to reserve host
            memory.

        Raises:
            CacheStateError: the cache was closed.
        """
        self._check_open()
        self._new_tokens = new_tokens
        for ledger in self._full:  # memory that came within a capture would come in each replay
            self._reserve(ledger, new_tokens)
        self._balances.tokens = self._full[0].tokens if self._full else 0
        self._stepped_tokens += new_tokens if self._streamed_captures.total() else 0
        failed = self._streaming is not None and self._streaming.failed
        if self._ahead is not None and self._ahead[0] == self._state() and not failed:
            return self._ahead[1]
        ready, balance = self._make_ready(), self._step_balance
        streamed = ready is not None and ready.form is Form.STREAMED
        if streamed and not balance.one_launch:
            balance.one_launch = True
            return self._make_ready()  # the share may be another one now
        if new_tokens == 1:  # of several some are launched now and then, and change no share
            balance.one_launch = streamed
        return ready

    def judge_step(self, new_tokens: int) -> None:
        """Correct the host's share by the last streamed step of so many new tokens, if it is new.

        To be called before `begin_step`. Another share needs another capture.
        """
        if self._streaming is None or self._balances.settled(new_tokens):
            return
        times = self._streaming.times(new_tokens)
        if times is not None:
            self._balances.at(new_tokens).note_step(times, new_tokens, self._balances.tokens)

    @property
    def share_changes(self) -> int:
        """How often streamed steps like the last one have changed the host's share."""
        return self._step_balance.changes

    def may_capture_streamed(self, share_changes: int) -> bool:
        """Return whether to capture the streamed step: not for a share that changes, nor often.

        The second one comes when it will: the first may have been made right before a change.

        Args:
            share_changes: how often captured steps have changed a share: as many captures more.
        """
        due = 2 + self._stepped_tokens // route.STEADY_TOKENS + share_changes
        return self._step_balance.settled and self._streamed_captures[self._new_tokens] < due

    @property
    def _step_balance(self) -> Balance:
        """The balance of steps of so many new tokens."""
        return self._balances.at(self._new_tokens)

    @property
    def _share(self) -> float:
        """Share of the tokens beside the residents that the host attends in the next step."""
        return self._step_balance.share if self._host_helps else 0.0

    @property
    def sends_home(self) -> bool:
        """Whether the step moves tokens, which `take_back` leaves where they are.

        Attention would then go through them in another order, and give other bits.
        """
        return any(isinstance(step, SendHome) for steps in self._next_steps() for step in steps)

    @property
    def reads_disk(self) -> bool:
        """Whether a step reads tokens from the disk, which drafts never do."""
        if self.drafting or not self.plan.disk_block_tokens or not self.disk_tokens:
            return False
        resident = self._full[-1].resident
        return resident is None or resident.tokens < self.disk_tokens

    def _next_steps(self) -> list[tuple[Step, ...]]:
        """Return what each track does with the new tokens."""
        executor, new_tokens, host_share = self._executor, self._new_tokens, self._share
        return [
            executor.steps_of(ledger, ledger.tokens, Pass.FORWARD, new_tokens, host_share).steps
            for ledger in self._ledgers
        ]

    def _state(self) -> tuple[object, ...]:
        """Return what changes where a token's place does, or who attends what."""
        who = self._new_tokens, self._share
        return *who, *(
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
            if self._at_home(ledger, steps) or self._behind_residents(steps):
                continue
            if self._new_tokens > 1 and not keeps_in_page(ledger.held, steps):
                return None
            if self.plan.disk_block_tokens:  # a capture cannot wait for what is read
                return None
            if not (self._executor.source.lends and stays(ledger.held, steps)):
                return None
            if self._host_helps is None:  # nor is it known what the host attends
                return None
            form = Form.STREAMED
        return form

    def _behind_residents(self, steps: Sequence[Step]) -> bool:
        """Whether several tokens are kept behind residents which are all that they see."""
        return self._new_tokens > 1 and Keep(Where.RESIDENT) in steps

    def _at_home(self, ledger: Ledger, steps: Sequence[Step]) -> bool:
        """Whether a token is kept and attended in host memory, where all it sees is one tile."""
        if self._new_tokens > 1 or Keep(Where.HOST) not in steps:
            return False
        whole = ledger.tokens < self.plan.tile_tokens and all(
            step.groups == 1 for step in steps if isinstance(step, Attend)
        )
        return whole and ledger.home_with_room() is not None

    def _ready_track(self, ledger: Ledger, steps: Sequence[Step], place: torch.Tensor) -> Ready:
        """Make a track ready for the new tokens."""
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
        page = (
            executor.with_room(Where.RESIDENT)
            if self._behind_residents(steps)
            else self._pages.page_with_room(ledger)
        )
        return Ready(ledger, page, after, StreamedTrack.of(ledger, page, steps[at:], place))

    def _memory(self) -> StepMemory:
        """Return the memory from which captured steps of so many tokens read what changes."""
        memory = self._step_memory.get(self._new_tokens)
        if memory is None:
            memory = self._step_memory[self._new_tokens] = self._new_step_memory(self._new_tokens)
        return memory

    def _new_step_memory(self, new_tokens: int = 1) -> StepMemory:
        heads = self.plan.batch * max(ledger.geometry.kv_heads for ledger in self._ledgers)
        return StepMemory(len(self._ledgers), heads, new_tokens, self._device.torch_device)

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
        self._ahead = None
        self._step_memory.clear()
        self._stepped_tokens = 0
        self._streamed_captures.clear()
        self._drop_streaming()
        super()._forget_memory()
