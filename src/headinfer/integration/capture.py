"""Decode steps that are replayed: a model's step, captured once, in one launch or in pieces.

So are passes of a few tokens that come again with as many, as those that verify drafts.

One launch has all of a step, also the copies of tiles and the host's attention. Pieces are for what
changes too often for that.

Python starts some hundred kernels in a step of a small model, and thousands in one of a large one.
A GPU does most of them faster than Python starts them. Captured, they are one launch.

A capture is trusted once it was compared. Its first replay, and the first after other calls, runs
beside the same step launched kernel by kernel, and must give the same bits. The first capture of a
kind is compared a token later than it was made. So whatever a model does with a Python number that
grows, or on the host, is found out. What it does from some length on is found out later: a capture
is compared again where the tokens have doubled.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from headinfer.device.base import CaptureError, Device
from headinfer.device.together import all_apart
from headinfer.engine.parted import CacheEngine
from headinfer.engine.ready import IN_PIECES, Form, ReadyStep
from headinfer.engine.stats import Stats
from headinfer.integration.alike import Way, go_alike
from headinfer.integration.autocast import without_autocast
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.captured_step import (
    CapturedStep,
    Step,
    distrust,
    make_room,
    make_step,
    owned_by,
    preparing,
    repays,
    taking_back,
)
from headinfer.integration.crossing import Crossings
from headinfer.integration.decode_call import DecodeCall, DecodeCalls
from headinfer.integration.fusion import Fusion
from headinfer.integration.hooks import HooksOfOthers
from headinfer.integration.outputs import are_equal, handed_out
from headinfer.integration.refused import RefusedCalls
from headinfer.integration.repeated import RepeatedCalls
from headinfer.ranks.group import ALONE, Ranks

_MOST_IN_VAIN = 8
"""Kinds of calls that are captured and then come no second time, until no other is tried."""


class CapturedSteps:
    """An attachment's captured decode steps.

    Args:
        model: the attached one.
        devices: where attention is computed; the first one launches.
        stats: where captures are counted, beside those of the cache.
        enabled: whether to capture at all.
        fused: whether to fuse small parts of the model in captured steps.
        obstacle: why no step of the model can be captured, as where hooks move what it computes;
            None where nothing is known.
        ranks: processes that compute the model: they run, capture and replay a step alike, or all
            of them launch it kernel by kernel.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        devices: Sequence[Device],
        stats: Stats,
        *,
        enabled: bool,
        fused: bool,
        obstacle: str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._model = weakref.ref(model)
        self._calls = DecodeCalls(model)
        self._devices, self._device = devices, devices[0]
        self._stats = stats
        self.enabled = enabled and self._device.captures and repays(model, self._device, ranks)
        self._obstacle = obstacle
        self._fusion = Fusion(model, enabled=fused and self.enabled and obstacle is None)
        self._hooks = HooksOfOthers(model)
        self._repeated = RepeatedCalls(several=not self._device.tiles_are_views)
        self._begun: dict[Hashable, bool] = {}  # whether with several tokens
        self._known: set[Hashable] = set()  # captures of these served more tokens than one
        self._refused = RefusedCalls(aloud=not self._device.tiles_are_views)

    def expect_steps(self, *, more_chunks: bool = False) -> None:
        """Prepare for steps to come; to be called once a chunk runs, of which more may come."""
        self._fusion.chunk_launched(more=more_chunks)

    def run(
        self,
        forward: Callable[..., Any],
        cache: OffloadedCache,
        arguments: dict[str, Any],
        new_tokens: int,
    ) -> Any:
        """Return the output of a call: by a replay where that is possible.

        Args:
            forward: the model's own.
            cache: the call's, in `arguments`, too.
            arguments: by name.
            new_tokens: of each row.
        """
        engine = cache.state.engine
        if engine is None or not self.enabled:
            return forward(**arguments)
        if self._obstacle is not None:
            if new_tokens == 1:
                self._refused.say_of_model(self._obstacle)
            return forward(**arguments)
        if new_tokens > 1:
            distrust(engine, new_tokens, verifies=cache.verifies)
        else:
            self._fusion.step_begins()
        first, call = self._repeated.is_new(engine, new_tokens), None
        if self._repeated.may_capture(engine, cache, arguments, new_tokens):
            call = self._replayable(cache, arguments, new_tokens)
        ways = [] if call is None else self._ways(call, engine)
        way = go_alike(self._ranks, ways, engine, in_a_row=not first, known=self._known)
        if way is None:
            if ways:
                self._refused.say_for_now("the ranks would capture different steps")
            self._repeated.note_launched(engine, new_tokens)
            if new_tokens == 1:
                distrust(engine, new_tokens)
            return forward(**arguments)
        call, ready = way
        captured = engine.captured.get(call.key)
        if captured is not None and (captured.reads != ready.reads or captured.moved):
            del engine.captured[call.key]
            captured = None
        self._repeated.note(engine, new_tokens)
        if captured is None and first:
            return forward(**arguments)  # many caches take no second one
        if captured is None or not captured.serves(call.past_tokens):
            if call.form is Form.IN_PIECES and engine.sends_home:
                return self._apart(forward, arguments)  # it could not be compared: the next one can
            with engine.steady():
                return self._compared(forward, cache, arguments, call, captured, ready)
        output = self._replayed(cache, call, captured)
        engine.end_step(call.form)
        if call.form is Form.STREAMED:
            engine.rest()
        for stats in (self._stats, cache.stats):
            stats.captured_drafts += engine.drafting
            stats.captured_steps += not engine.drafting
            stats.captured_verifications += new_tokens > 1
        return output

    def _agree(self, call: DecodeCall) -> None:
        """Refuse a call here where another rank refuses it."""
        if self._ranks.any(call.key in self._refused.keys):
            self._refused.keys.add(call.key)

    def _compared(
        self,
        forward: Callable[..., Any],
        cache: OffloadedCache,
        arguments: dict[str, Any],
        call: DecodeCall,
        captured: CapturedStep | None,
        ready: ReadyStep,
    ) -> Any:
        """Capture a step, or replay what is captured; run it as it is, and return that output."""
        engine = cache.state.engine
        assert engine is not None
        if captured is None:
            crossings = Crossings(self._model())
            step = make_step(forward, cache, call, self._calls.cache_name, crossings)
            if call.key not in self._known:
                return self._begin(arguments, cache, call, step, ready)
            with preparing(self._stats, cache.stats):
                captured = self._capture(cache, call, step, ready)
            self._agree(call)
        if captured is None or call.key in self._refused.keys:
            engine.captured.pop(call.key, None)
            return self._apart(forward, arguments)
        output = None
        awaited = self._ranks.size > 1
        attempt = self._refused.attempt(cache, call, awaited=awaited)
        with attempt, taking_back(engine, call.form):
            output = self._replayed(cache, call, captured)
        wanted = self._apart(forward, arguments)
        self._agree(call)
        if call.key in self._refused.keys:
            engine.captured.pop(call.key, None)
        else:
            equal = not self._ranks.any(not are_equal(output, wanted))
            self._judge(engine, call, captured, equal)
        return wanted

    def _replayed(self, cache: OffloadedCache, call: DecodeCall, captured: CapturedStep) -> Any:
        """Replay a step for a call's tensors; return its output."""
        engine = cache.state.engine
        assert engine is not None
        captured.step.fill(call.tensors)
        with without_autocast(self._device.torch_device.type):  # as where the model attends
            replayed = engine.replay(call.form, captured.capture)
        return handed_out(replayed, cache)

    def _replayable(
        self, cache: OffloadedCache, arguments: dict[str, Any], new_tokens: int
    ) -> DecodeCall | None:
        try:
            call = self._calls.read(cache, arguments, new_tokens)
            if call is None:
                return None
            if self._hooks.there_are_any():
                raise CaptureError("others have hooks on the model's modules")
        except CaptureError as error:
            self._refused.say_for_now(str(error))
            return None
        return None if self._refused.in_all_forms(call) else call

    def _ways(self, call: DecodeCall, engine: CacheEngine) -> list[Way]:
        """Return a call in the best form that is not refused, and in what else ranks may agree on.

        Nothing where all forms are refused.
        """
        if self._ranks.size == 1:  # each would find other shares, and make all capture for each
            engine.judge_step(call.new_tokens)
        ready = engine.begin_step(call.new_tokens) or IN_PIECES
        best = self._in_form(call, engine, ready)
        ways = [best]
        if best is not None and best.call.form is Form.STREAMED and self._ranks.size > 1:
            ways.append(self._in_form(call, engine, IN_PIECES))
        return [way for way in ways if way is not None]

    def _in_form(self, call: DecodeCall, engine: CacheEngine, ready: ReadyStep) -> Way | None:
        """Return a call in the form that is ready, or else in pieces; None where it is refused."""
        call = call.in_form(ready.form)
        if ready.form is Form.STREAMED and not engine.may_capture_streamed(engine.share_changes):
            captured = engine.captured.get(call.key)
            if captured is None or captured.reads != ready.reads:
                call, ready = call.in_form(Form.IN_PIECES), IN_PIECES
        if call.key in self._refused.keys and not engine.drafting:  # a draft is in one launch
            call, ready = call.in_form(Form.IN_PIECES), IN_PIECES
        if call.key in self._refused.keys:
            return None
        if call.key in self._begun:
            return Way(call, ready)
        in_vain = self._begun.keys() - self._known - self._refused.keys
        if sum(self._begun[key] == call.several for key in in_vain) >= _MOST_IN_VAIN:
            self._refused.say("their arguments are others in each call", call.new_tokens)
            return None
        return Way(call, ready)

    def _apart(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run a call where captures are made, and fused as they are, but kernel by kernel."""
        with all_apart(self._devices), self._fusion.on():
            return forward(**arguments)

    def _begin(
        self,
        arguments: dict[str, Any],
        cache: OffloadedCache,
        call: DecodeCall,
        step: Step,
        ready: ReadyStep,
    ) -> Any:
        """Run a step in the form to be captured, capture it, and run it as it is.

        All that a capture must find prepared is, after the first: programs, workspaces, and
        whatever a model makes in its first call. The last's output is returned.
        """
        engine = cache.state.engine
        assert engine is not None

        def run() -> Any:
            engine.prepare(call.form)
            with taking_back(engine, call.form):
                return handed_out(self._apart(step.run, {}), cache)

        self._begun[call.key] = call.several
        output = None
        with preparing(self._stats, cache.stats):
            if self._fusion.untried:
                self._fusion.try_out(run)
                cache.state.functions.forget_pending()
            with self._refused.attempt(cache, call, awaited=self._ranks.size > 1):
                output = run()
            self._agree(call)
            if call.key not in self._refused.keys:
                self._capture(cache, call, step, ready)
                self._agree(call)
        wanted = self._apart(step.forward, arguments)
        if call.key not in self._refused.keys:
            equal = are_equal(output, wanted)
            if self._ranks.any(not equal):
                self._refused.refuse_for_its_bits(call)
        if call.key in self._refused.keys:
            engine.captured.pop(call.key, None)
        return wanted

    def _capture(
        self, cache: OffloadedCache, call: DecodeCall, step: Step, ready: ReadyStep
    ) -> CapturedStep | None:
        """Capture a step, for the engine to keep; return None where that was not possible."""
        model, engine = self._model(), cache.state.engine
        assert model is not None
        assert engine is not None
        captured = None
        make_room(engine, call)
        with self._refused.attempt(cache, call):
            engine.prepare(call.form, runs=False)
            with self._fusion.on():
                capture = self._device.capture(step.run, *self._devices[1:])
            weights = tuple(each.detach() for each in (*model.parameters(), *model.buffers()))
            movable = weights if self._device.tiles_are_views else ()
            captured = CapturedStep(
                *(step, capture, ready.reads, weights),
                *(call.past_tokens, call.new_tokens, engine.drafting),
                addresses=tuple(weight.data_ptr() for weight in movable),
                owned=owned_by(model) if engine.drafting or call.new_tokens > 1 else (),
            )
            engine.captured[call.key] = captured
        for stats in (self._stats, cache.stats):
            stats.captures += captured is not None
        return captured

    def _judge(
        self, engine: CacheEngine, call: DecodeCall, captured: CapturedStep, equal: bool
    ) -> None:
        """Trust a capture that gave what it should, and no other.

        One that was right before may have been overtaken, as by another adapter. The next such call
        then begins anew.
        """
        known = call.key in self._known
        if equal:
            captured.trusted = known or call.past_tokens != captured.past_tokens
            captured.compared_tokens = call.past_tokens
            if captured.trusted:
                self._known.add(call.key)
            return
        engine.captured.pop(call.key, None)
        self._known.discard(call.key)
        if not known or call.past_tokens == captured.past_tokens:
            self._refused.refuse_for_its_bits(call)
