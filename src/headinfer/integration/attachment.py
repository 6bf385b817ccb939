"""Attaching to one model instance and leaving it as it was.

Nothing of transformers or of the model's class is changed. The instance's config is replaced, in
all its modules, by a copy that names our attention, so that other models sharing the config do not
notice; two hooks watch the model's calls. Detaching puts the same config objects back.
"""

import copy
import functools
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headinfer.device.base import Mark
from headinfer.engine.stats import Stats
from headinfer.errors import CacheStateError, UnsupportedModelError
from headinfer.integration import chunking
from headinfer.integration.attention import AttentionFunctions
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.calls import cache_name, named_arguments, new_shape
from headinfer.integration.support import is_static
from headinfer.plan.plan import Plan

_logger = logging.getLogger(__name__)
_numbers = itertools.count()

_FEW_TOKENS = 32
"""A call with up to so many new tokens on a filled cache counts as decoding (it is speculative)."""

_NAME_PREFIX = "headinfer_"


class AttachmentOwner(Protocol):
    """What the hooks need of the offload they serve."""

    stats: Stats

    def new_cache(self) -> OffloadedCache:
        """Return a cache for a call that brings none."""

    def owns(self, cache: OffloadedCache) -> bool:
        """Whether a cache belongs to this attachment."""

    def chunk_tokens(self, cache: OffloadedCache) -> int:
        """Return the tokens of a prefill chunk."""

    def plan_whole(self, cache: OffloadedCache, batch: int, tokens: int) -> Plan:
        """Make room for a call whose tokens cannot pass in chunks, or refuse."""

    def mark_compute(self) -> Mark:
        """Return a mark behind the model's work so far."""

    def finish_compute(self) -> None:
        """Block until the model's work is done, and raise what failed in it."""

    def report_prefill(self, done_tokens: int, all_tokens: int) -> None:
        """Hear of progress."""

    def after_call(self, cache: OffloadedCache) -> None:
        """Hear of a finished call."""


def is_attached(model: PreTrainedModel) -> bool:
    """Whether a model's attention is ours already."""
    name = model.config.get_text_config(decoder=True)._attn_implementation
    return isinstance(name, str) and name.startswith(_NAME_PREFIX)


class Attachment:
    """Our attention on one model instance, from construction until `remove`.

    Args:
        model: supported and not attached.
        owner: told of the model's calls.

    Attributes:
        functions: the attention and mask functions of this attachment.
    """

    def __init__(self, model: PreTrainedModel, owner: AttachmentOwner) -> None:
        self.functions = AttentionFunctions(f"{_NAME_PREFIX}{next(_numbers)}")
        self._model = model
        self._owner = owner
        self._restore: list[Callable[[], object]] = []
        self._started_s = 0.0
        self._new_tokens = 0
        self._rows = 0
        self._decoding = False
        self._warned = False
        self._chunking = chunking.Chunking(model)
        self._logits: list[torch.Tensor] = []
        self._chunks: list[tuple[Mark, int]] = []  # begun, with the tokens done after each
        self._cache: OffloadedCache | None = None
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        self.functions.register()
        self._restore.append(self.functions.unregister)
        self._swap_config()
        for handle in (
            self._model.register_forward_pre_hook(self._before_call, with_kwargs=True),
            self._model.register_forward_hook(self._after_call, with_kwargs=True, always_call=True),
        ):
            self._restore.append(handle.remove)

    def _swap_config(self) -> None:
        copies: dict[int, Any] = {}
        config = copy.deepcopy(self._model.config, copies)
        config.get_text_config(decoder=True)._attn_implementation = self.functions.name
        for module in self._model.modules():
            original = module.__dict__.get("config")
            if id(original) in copies:
                self._restore.append(functools.partial(setattr, module, "config", original))
                module.config = copies[id(original)]

    def remove(self) -> None:
        """Leave the model as it was; may be called again."""
        while self._restore:
            self._restore.pop()()
        self._forget_call()

    def _before_call(
        self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Check a call, give it a cache, and run all of its chunks but the last."""
        self._forget_call()
        arguments = named_arguments(model, args, kwargs)
        self._chunking.drop_empty(arguments)
        shape = new_shape(arguments)
        cache = self._cache_of(arguments)
        if shape is None or cache is None:
            return (), arguments
        batch, new_tokens = shape
        past_tokens = cache.get_seq_length()
        cache.state.prepare(batch, new_tokens)
        chunk_tokens = self._owner.chunk_tokens(cache)
        in_chunks = new_tokens > chunk_tokens
        if in_chunks and (
            obstacle := self._chunking.obstacle(model.forward, arguments, past_tokens)
        ):
            in_chunks = False
            with self._chunking.passing_whole(obstacle, new_tokens, chunk_tokens):
                self._owner.plan_whole(cache, batch, new_tokens)
        self._started_s = time.perf_counter()
        self._cache = cache
        self._rows = batch
        self._new_tokens = new_tokens
        self._decoding = past_tokens > 0 and new_tokens <= _FEW_TOKENS
        cache.begin_call()
        if in_chunks:
            arguments = self._chunking.with_positions(arguments, past_tokens)
            arguments, self._logits = chunking.run_leading_chunks(
                model.forward, arguments, chunk_tokens, past_tokens, self._after_chunk
            )
        return (), arguments

    def _after_chunk(self, done_tokens: int, all_tokens: int) -> None:
        assert self._cache is not None
        self._cache.shrink_windows()
        self._chunks.append((self._owner.mark_compute(), done_tokens))
        # The next chunk is begun while the device computes this one, so that it never waits.
        self._report_chunks(self._chunks, all_tokens, begun=1)

    def _report_chunks(
        self, chunks: list[tuple[Mark, int]], all_tokens: int, *, begun: int
    ) -> None:
        """Report and forget the chunks that are done, waiting for all but the newest `begun`."""
        while chunks and (len(chunks) > begun or chunks[0][0].reached):
            mark, done_tokens = chunks.pop(0)
            mark.wait()
            self._owner.report_prefill(done_tokens, all_tokens)

    def _after_call(
        self, _model: torch.nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Count the call, and join the logits of its chunks; without output the call failed."""
        if output is None:
            self._forget_call()
            return None
        self.functions.check_none_pending()
        cache, leading_logits, chunks = self._cache, self._logits, self._chunks
        self._forget_call()
        if cache is None:
            return output
        self._report_chunks(chunks, self._new_tokens, begun=0)
        self._owner.finish_compute()
        seconds = time.perf_counter() - self._started_s
        stats = self._owner.stats
        if self._decoding:
            stats.decode_tokens += self._rows * self._new_tokens
            stats.decode_s += seconds
            stats.decode_steps += 1
        else:
            stats.prefill_tokens += self._rows * self._new_tokens
            stats.prefill_s += seconds
            self._owner.report_prefill(self._new_tokens, self._new_tokens)
        cache.end_call()
        self._owner.after_call(cache)
        if leading_logits:
            output.logits = torch.cat([*leading_logits, output.logits], dim=1)
        return output

    def _forget_call(self) -> None:
        self.functions.pending = None
        self._logits = []
        self._chunks = []
        self._cache = None

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
                return None
            cache = arguments[name] = self._owner.new_cache()
        if isinstance(cache, OffloadedCache):
            if not self._owner.owns(cache):
                raise CacheStateError(
                    "this cache belongs to another attachment; use offload.new_cache() of this one"
                )
            return cache
        if not isinstance(cache, Cache) or is_static(cache):
            raise UnsupportedModelError(
                f"a {type(cache).__name__} cannot be used with an attached model; pass "
                f"{name}=offload.new_cache()"
            )
        level = logging.DEBUG if self._warned else logging.WARNING
        self._warned = True
        _logger.log(
            level,
            "the model is attached, but its KV cache is a %s and stays on the device; pass "
            "%s=offload.new_cache() to offload it",
            type(cache).__name__,
            name,
        )
        return None
