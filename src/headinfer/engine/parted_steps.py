"""Captured steps of a cache whose layers lie on several devices: all of them are in one capture.

Each engine does its part as it does on one device, with tiles, waits and the host's share of its
own. The parts need not have the same form: some layers may be resident and others streamed.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from headinfer.device.base import Capture
from headinfer.engine.engine import Engine
from headinfer.engine.ready import Form, ReadyStep

_Result = TypeVar("_Result")


class CapturableParts:
    """A cache's engines, to whose layers a captured step can add a token in each row, or a few.

    What is called when is as in `CapturableTokens`.

    Args:
        parts: an engine for each device.
        layers: which layers each of them has, counted among all, in their order.

    Attributes:
        parts: the engines.
        captured: captured steps, by whatever tells them apart; forgotten when memory of the tokens
            goes on any device.
    """

    def __init__(self, parts: Sequence[Engine], layers: Sequence[Sequence[int]]) -> None:
        self.parts = tuple(parts)
        self.captured: dict[Hashable, Any] = {}
        for part in self.parts:
            part.captured = self.captured
        self._layers = [tuple(own) for own in layers]
        self._forms = [Form.IN_PIECES] * len(self.parts)  # of each in the step that is ready

    def begin_step(self, new_tokens: int = 1) -> ReadyStep | None:
        """Make all parts ready for a step; see `ReadyTokens.begin_step`."""
        steps: list[ReadyStep] = []
        for part in self.parts:
            with part.in_use():
                step = part.begin_step(new_tokens)
            if step is None:
                return None
            steps.append(step)
        self._forms = [step.form for step in steps]
        form = Form.STREAMED if Form.STREAMED in self._forms else Form.ONE_LAUNCH
        return ReadyStep(form, tuple(step.reads for step in steps))

    def judge_step(self, new_tokens: int) -> None:
        """Correct the host's shares by the last step; see `ReadyTokens.judge_step`."""
        for part in self.parts:
            part.judge_step(new_tokens)

    @property
    def share_changes(self) -> int:
        """How often streamed steps have changed a share of the host's, of any part."""
        return sum(part.share_changes for part in self._streaming)

    def may_capture_streamed(self, share_changes: int) -> bool:
        """Return whether to capture a streamed step; see `ReadyTokens.may_capture_streamed`."""
        return all(part.may_capture_streamed(share_changes) for part in self._streaming)

    @property
    def _streaming(self) -> list[Engine]:
        """The parts that stream in the step that is ready."""
        in_forms = zip(self.parts, self._forms, strict=True)
        return [part for part, form in in_forms if form is Form.STREAMED]

    @property
    def sends_home(self) -> bool:
        """Whether a step moves tokens; see `ReadyTokens.sends_home`."""
        return any(part.sends_home for part in self.parts)

    @property
    def reads_disk(self) -> bool:
        """Whether a step reads tokens from the disk; see `ReadyTokens.reads_disk`."""
        return any(part.reads_disk for part in self.parts)

    def prepare(self, form: Form, *, runs: bool = True) -> None:
        """Make the devices ready for a step; see `CapturableTokens.prepare`."""
        for part, own in self._in_forms(form):
            with part.in_use():
                part.prepare(own, runs=runs)

    def replay(self, form: Form, capture: Capture[_Result]) -> _Result:
        """Replay a step."""
        with self._all(Engine.replaying, form):
            return capture.replay()

    def capturing(self, form: Form) -> AbstractContextManager[None]:
        """Have `attend` serve a step that is captured; see `CapturableTokens.capturing`."""
        return self._all(Engine.capturing, form)

    def end_step(self, form: Form) -> None:
        """Count the tokens that a replay has added; see `CapturableTokens.end_step`."""
        for part, own in self._in_forms(form):
            with part.in_use():
                part.end_step(own)

    def rest(self) -> None:
        """Sleep until the host has done its part of a step, which each device asks by itself."""
        for part in self.parts:
            part.rest()

    def steady(self) -> AbstractContextManager[None]:
        """Have who attends which tokens stay; see `CapturableTokens.steady`."""
        return self._all(lambda part, _form: part.steady(), Form.IN_PIECES)

    def keeps_all(self, layers: int) -> bool:
        """Whether as many layers keep all their tokens, so that any can be taken back."""
        owned = zip(self.parts, self._layers, strict=True)
        kept = [part.keeps_all(len(own)) for part, own in owned]
        return all(kept) and sum(len(own) for own in self._layers) == layers

    def take_back(self, lengths: Sequence[int]) -> None:
        """Keep so many tokens of each layer, where a step has added to some."""
        for part, own in zip(self.parts, self._layers, strict=True):
            with part.in_use():
                part.take_back([lengths[layer_idx] for layer_idx in own])

    def _in_forms(self, form: Form) -> Iterator[tuple[Engine, Form]]:
        """Yield each part, and the form that its layers have in a step of some form."""
        for part, own in zip(self.parts, self._forms, strict=True):
            yield part, form if form is Form.IN_PIECES else own

    @contextlib.contextmanager
    def _all(
        self, enter: Callable[[Engine, Form], AbstractContextManager[None]], form: Form
    ) -> Iterator[None]:
        """Enter something of each part, with its form, in the `with` statement."""
        with contextlib.ExitStack() as entered:
            for part, own in self._in_forms(form):
                with part.in_use():
                    entered.enter_context(enter(part, own))
            yield
