"""Attaching to one model instance and leaving it as it was.

Nothing of transformers or of the model's class is changed. The instance's config is replaced, in
all its modules, by a copy that names our attention. So other models sharing the config do not
notice. The instance's calls come to us first, through a `forward` of its own. Detaching undoes
both.
"""

import contextlib
import functools
import itertools
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headinfer.device.launches import launches
from headinfer.engine.ending import uninterrupted
from headinfer.errors import CacheStateError, DiskError, MemoryPlanError, UnsupportedModelError
from headinfer.integration.attention import AttentionFunctions
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.calls import cache_name, named_arguments, new_shape
from headinfer.integration.capture import CapturedSteps
from headinfer.integration.chunking import Chunking
from headinfer.integration.configs import OwnCacheKind, SwappedConfigs
from headinfer.integration.disk_below import take_back_failed
from headinfer.integration.faster import FasterParts
from headinfer.integration.forward import InstanceForward
from headinfer.integration.history import check_given
from headinfer.integration.rotary import rotary_modules_by_length
from headinfer.integration.said import SaidOnce
from headinfer.integration.serving import AttachmentOwner, ServedCall
from headinfer.integration.support import is_static
from headinfer.integration.turns import Turns
from headinfer.schedule.route import MAX_ASKED_TOKENS

_logger = logging.getLogger(__name__)
_numbers = itertools.count()

_TRIED_TOKENS = 32

_MARK = "_headinfer_session"
"""The attribute of an attached model that holds whoever attached to it."""


def owner_of(model: object) -> object | None:
    """Return whoever attached to a model; None if nobody did."""
    return cast("object | None", getattr(model, _MARK, None))


class Attachment:
    """An attachment of our attention to one model instance, from construction until `remove`.

    Args:
        model: supported and not attached.
        owner: told of the model's calls.
        captures: of its decode steps.
        faster: parts of it that compute faster in some calls.
        padded: whether rows with padding are served.

    Attributes:
        functions: the attention and mask functions of this attachment.
        turns: taken for each call of the model, and for what changes its caches beside a call.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        owner: AttachmentOwner,
        captures: CapturedSteps,
        faster: FasterParts,
        *,
        padded: bool = True,
    ) -> None:
        self.turns = Turns()
        self.functions = AttentionFunctions(
            f"headinfer_{next(_numbers)}", self.turns, padded=padded
        )
        self._model = model
        self._owner = owner
        self._captures = captures
        self._faster = faster
        self._restore: list[Callable[[], object]] = []
        self._calls: list[ServedCall] = []  # under way; more than one where a call makes another
        self._log = SaidOnce(_logger)
        self._chunking = Chunking(model)
        self._rotary_modules = rotary_modules_by_length(model)
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        self.functions.register()
        # Also when the model is dropped while attached: the registries are there for ever.
        unregister = weakref.finalize(self, self.functions.unregister)
        unregister.atexit = False
        self._restore.append(unregister)
        # What undoes a step is noted before the step, for that may be interrupted half-way.
        configs = SwappedConfigs(self._model, self.functions.name)
        self._restore.append(configs.restore)
        configs.swap()
        cache_kind = OwnCacheKind(self._model)
        self._restore.append(cache_kind.restore)
        cache_kind.take_out()
        forward = InstanceForward(self._model, self._serve, _MARK)
        self._restore.append(forward.remove)
        forward.install()
        self._restore.append(lambda: self._model.__dict__.pop(_MARK, None))
        self._model.__dict__[_MARK] = self._owner

    def remove(self) -> None:
        """Leave the model as it was, once the calls of other threads are through.

        May be called again.

        Raises:
            CacheStateError: called from within a call of the model.
        """
        self.between_calls(self._remove)

    def between_calls(self, function: Callable[[], object]) -> None:
        """Call a function in a turn, once no call of another thread is under way.

        Raises:
            CacheStateError: called from within a call of the model.
        """

        def attempt() -> bool:
            if any(call.thread == threading.get_ident() for call in self._calls):
                raise CacheStateError("a model cannot be detached from within a call of it")
            if self._calls:  # between two chunks
                return False
            function()
            return True

        while not self.turns.run(attempt):
            self.turns.pass_on()

    def _remove(self) -> None:
        while self._restore:
            self._restore[-1]()  # each may be called again, if this is interrupted
            self._restore.pop()

    def goes_on_alike(self) -> bool:
        """Whether a call gives the same for a prompt whose beginning another call has read.

        A model with a recurrent state is tried out on a few tokens. Rotary frequencies that follow
        the length of a pass are none of the beginning's.
        """
        if self._rotary_modules:
            return False
        tokens = torch.ones((1, _TRIED_TOKENS), dtype=torch.long, device=self._model.device)
        arguments = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        own = self._model.forward
        inner = own.inner if isinstance(own, InstanceForward) else own
        return self.turns.run(self._chunking.obstacle, inner, arguments, 0) is None

    def _serve(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Serve a call of the model: the one entry of all threads."""
        return self.turns.run(self._serve_in_turn, forward, args, kwargs)

    def _serve_in_turn(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Check a call, give it a cache, and have it run."""
        if not self._restore:  # detached while this thread waited
            return forward(*args, **kwargs)
        arguments = named_arguments(self._model, args, kwargs)
        self._chunking.drop_empty(arguments)
        shape, cache = new_shape(arguments), self._cache_of(arguments)
        if shape is not None and not shape[1]:
            check_given(arguments, arguments.get(cache_name(self._model)))
        try:
            if shape is None or cache is None:
                self._owner.answers.clear()
                output = forward(**arguments)
                self.functions.check_none_pending()
                return output
            return self._serve_cache(forward, arguments, cache, shape)
        finally:
            self.functions.forget_pending()

    def _serve_cache(
        self,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        cache: OffloadedCache,
        shape: tuple[int, int],
    ) -> Any:
        """Run a call with an offloaded cache."""
        while (own := self._calls_with(cache)) and threading.get_ident() not in own:
            self.turns.pass_on()  # another thread's, between two chunks
        if own:
            raise CacheStateError(
                "the model was called with a cache that a call under way is using, as from a hook "
                "or a progress callback; pass another cache"
            )
        is_prompt = shape[1] > MAX_ASKED_TOKENS  # steps are launched beside whatever else goes on
        faster = functools.partial(self._faster.on, *shape)
        if is_prompt:  # other threads' calls have their turns between its chunks
            forward = _within(faster, forward)
        call = ServedCall(
            self._owner, self._chunking, forward, cache, shape, rotary_modules=self._rotary_modules
        )
        try:
            self._calls.append(call)
            watchers = () if cache.state.drafting else tuple(cache.watchers)
            for watcher in watchers:
                watcher.begin()
            with launches.under_way() if is_prompt else contextlib.nullcontext():
                arguments = call.begin(arguments)
                with contextlib.nullcontext() if is_prompt else faster():
                    output = self._captures.run(forward, cache, arguments, shape[1])
            self.functions.check_none_pending()
            output = call.end(output)
            for watcher in watchers:
                watcher.end(output)
            return output
        except (DiskError, MemoryPlanError):
            take_back_failed(cache)
            raise
        finally:
            uninterrupted(lambda: self._leave(call))

    def _calls_with(self, cache: OffloadedCache) -> set[int]:
        """Return the threads of the calls under way with a cache."""
        return {call.thread for call in self._calls if call.cache is cache}

    def _leave(self, call: ServedCall) -> None:
        """Forget a call, however it ended; may be called again."""
        call.leave()
        if call in self._calls:
            self._calls.remove(call)

    def _cache_of(self, arguments: dict[str, Any]) -> OffloadedCache | None:
        """Return the call's offloaded cache, made here if there is none; None for other caches."""
        if arguments.get("output_attentions"):
            raise UnsupportedModelError(
                "output_attentions=True is not served: the attention weights never exist as a whole"
            )
        name = cache_name(self._model)
        cache = arguments.get(name)
        if cache is None:
            use_cache = arguments.get("use_cache")
            if use_cache is None:
                use_cache = self._model.config.get_text_config(decoder=True).use_cache
            if not use_cache:
                self._say_exact("without a cache")
                return None
            cache = arguments[name] = self._owner.new_cache()
        if isinstance(cache, OffloadedCache):
            if not self._owner.owns(cache):
                raise CacheStateError(
                    "this cache belongs to another attachment, of another model or an earlier one "
                    "of this model; use offload.new_cache() of this one"
                )
            return cache
        if not isinstance(cache, Cache) or is_static(cache):
            raise UnsupportedModelError(
                f"a {type(cache).__name__} cannot be used with an attached model; pass "
                f"{name}=offload.new_cache()"
            )
        self._log.say(
            *(logging.WARNING, "cache"),
            "the model is attached, but its KV cache is a %s and stays on the device; pass "
            "%s=offload.new_cache() to offload it",
            type(cache).__name__,
            name,
        )
        self._say_exact("with a cache that is not of this attachment")
        return None

    def _say_exact(self, how: str) -> None:
        """Say where heads do not stream although the attachment's do."""
        if not self.functions.padded:
            self._log.say(
                *(logging.WARNING, how),
                "%s all heads see all tokens: they stream in caches of this attachment alone",
                how,
            )


def _within(
    context: Callable[[], contextlib.AbstractContextManager[object]], forward: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a forward that runs within a context, with the same signature."""

    @functools.wraps(forward, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return forward(*args, **kwargs)

    return run
