"""One decode step of a model, or a pass that verifies drafts, in a form that is captured."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from headinfer.device.base import Capture, Device
from headinfer.engine.parted import CacheEngine
from headinfer.engine.ready import Form
from headinfer.engine.stats import Stats
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.crossing import Crossings
from headinfer.integration.decode_call import DecodeCall
from headinfer.integration.outputs import without_cache
from headinfer.integration.stored_weights import weights_bytes
from headinfer.plan.memory import MOST_DRAFTED
from headinfer.ranks.group import Ranks

_REPAYING_BYTES = 2 * 2**30
"""Weights that the CPU reads in ten times as long as a model's Python takes."""


def repays(model: torch.nn.Module, device: Device, ranks: Ranks) -> bool:
    """Whether captures of a model's steps are worth making; on the CPU that takes a step or two.

    Ranks on the CPU do together what no capture has.
    """
    if not device.tiles_are_views:
        return True
    return ranks.size == 1 and weights_bytes(model) <= _REPAYING_BYTES


Owned = tuple[dict[str, Any], str, torch.Tensor, int]
"""A tensor of a module: where the module keeps it, its name there, itself, and its address.

The address is 0 where it has no memory of its own, as a quantised one that wraps others.
"""


def owned_by(model: torch.nn.Module) -> tuple[Owned, ...]:
    """Return the parameters and buffers of a model."""
    return tuple(
        (owner, name, tensor, 0 if hasattr(tensor, "__tensor_flatten__") else tensor.data_ptr())
        for module in model.modules()
        for owner in (module._parameters, module._buffers)
        for name, tensor in owner.items()
        if tensor is not None
    )


@dataclass(slots=True)
class Step:
    """A step of one cache, in the form that is captured.

    It keeps neither the cache nor its engine alive: the engine keeps it.

    Attributes:
        forward: the model's own.
        engine: of the cache.
        cache: of the call.
        arguments: of the call, by name, without the cache. The tensors among them are memory from
            which the step reads those of later calls.
        cache_name: what the cache is passed as.
        form: how attention is captured.
        crossings: of the model.
    """

    forward: Callable[..., Any]
    engine: "weakref.ref[CacheEngine]"
    cache: "weakref.ref[OffloadedCache]"
    arguments: dict[str, Any]
    cache_name: str
    form: Form
    crossings: Crossings

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Have the step read these, on compute."""
        for name, tensor in tensors.items():
            self.arguments[name].copy_(tensor)

    def run(self) -> Any:
        """Call the model, and leave the cache out of its output."""
        engine, cache = self.engine(), self.cache()
        assert engine is not None
        assert cache is not None
        crossed = self.crossings.once(discards=False)
        with engine.capturing(self.form), _without_autocast_memory(), crossed:
            output = self.forward(**self.arguments, **{self.cache_name: cache})
        return without_cache(output, cache)


def make_step(
    forward: Callable[..., Any],
    cache: OffloadedCache,
    call: DecodeCall,
    cache_name: str,
    crossings: Crossings,
) -> Step:
    """Return a step with tensors of its own, which hold what a call brings.

    Args:
        forward: the model's own.
        cache: the call's.
        call: to be captured.
        cache_name: what the model takes a cache as.
        crossings: of the model.
    """
    engine = cache.state.engine
    assert engine is not None
    with torch.inference_mode(False):  # or they could not be written to outside it
        tensors = {name: torch.empty_like(each) for name, each in call.tensors.items()}
    step = Step(
        *(forward, weakref.ref(engine), weakref.ref(cache)),
        *(call.others | tensors, cache_name, call.form),
        crossings,
    )
    step.fill(call.tensors)
    return step


@contextlib.contextmanager
def preparing(*stats: Stats) -> Iterator[None]:
    """Count the time until the `with` statement ends as that of captures."""
    started_s = perf_counter()
    try:
        yield
    finally:
        seconds = perf_counter() - started_s
        for each in stats:
            each.capture_s += seconds


@contextlib.contextmanager
def taking_back(engine: CacheEngine, form: Form) -> Iterator[None]:
    """Take back what a step in pieces adds by itself, also where it fails."""
    if form is not Form.IN_PIECES:
        yield
        return
    lengths = engine.lengths()
    try:
        yield
    finally:
        engine.take_back(lengths)


@dataclass(slots=True)
class CapturedStep:
    """A capture of a step.

    Attributes:
        step: what was captured.
        capture: gives the output.
        reads: memory of the cache's tokens, and numbers, that are in the capture.
        weights: memory of the model, which the capture reads even where the model has other by now.
        past_tokens: in the cache when it was captured.
        new_tokens: of each row.
        drafts: whether it drafts a token.
        addresses: of these weights, to be looked at before each replay; empty where none moves. On
            the CPU one may, as to be shared with another process.
        owned: the model's parameters and buffers when it was captured, where it drafts a token or
            verifies drafts. As long as they are the same, a pass that verifies leaves it trusted.
        trusted: whether it was compared since the cache was last used otherwise.
        compared_tokens: in the cache when it was last compared, and right.
    """

    step: Step
    capture: Capture[Any]
    reads: tuple[object, ...]
    weights: tuple[torch.Tensor, ...]
    past_tokens: int
    new_tokens: int = 1
    drafts: bool = False
    addresses: tuple[int, ...] = ()
    owned: tuple[Owned, ...] = ()
    trusted: bool = False
    compared_tokens: int = 0

    @property
    def moved(self) -> bool:
        """Whether memory of the model that it reads is no more."""
        pairs = zip(self.weights, self.addresses, strict=False)
        return any(weight.data_ptr() != address for weight, address in pairs)

    @property
    def outdated(self) -> bool:
        """Whether a parameter or buffer of the model is another one now, or elsewhere."""
        return any(
            (now := owner.get(name)) is not tensor or (address and now.data_ptr() != address)
            for owner, name, tensor, address in self.owned
        )

    def serves(self, past_tokens: int) -> bool:
        """Whether it can be replayed behind so many tokens without being compared.

        It is compared again at each power of two, for models that branch at some length. Those are
        17 comparisons in 128K tokens.
        """
        doubled = past_tokens.bit_length() > self.compared_tokens.bit_length()
        return self.trusted and not doubled


_MOST_NUMBERS = 2
"""Numbers of new tokens, beside one, of which a cache keeps captures at once."""


def make_room(engine: CacheEngine, call: DecodeCall) -> None:
    """Let go of the oldest captures where a call is of another number of tokens than all of them.

    Args:
        engine: keeps the captures.
        call: about to be captured.
    """
    numbers = dict.fromkeys(each.new_tokens for each in engine.captured.values())
    several = [number for number in numbers if number not in (1, call.new_tokens)]
    if call.new_tokens == 1 or len(several) < _MOST_NUMBERS:
        return
    for key, captured in list(engine.captured.items()):
        if captured.new_tokens == several[0]:
            del engine.captured[key]


def distrust(engine: CacheEngine, new_tokens: int, *, verifies: bool = False) -> None:
    """Have captures compared before they are used again: others may have changed the model.

    Those that read weights which were replaced go, with these weights. A pass that verifies drafts
    leaves the others as they are. Any pass of few tokens does so with drafts: what these give is
    verified in any case, and a wrong one costs time alone.

    Args:
        engine: keeps the captures.
        new_tokens: of the pass between.
        verifies: whether that is said to verify drafts.
    """
    for key, captured in tuple(engine.captured.items()):
        if captured.outdated:
            del engine.captured[key]
        elif not verifies and not (captured.drafts and new_tokens <= MOST_DRAFTED + 1):
            captured.trusted = False


@contextlib.contextmanager
def _without_autocast_memory() -> Iterator[None]:
    """Have autocast keep no casts of weights: those would go before the capture that reads them."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
