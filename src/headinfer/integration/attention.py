"""Our entries in transformers' attention and mask registries.

In every supported model a layer calls its cache's `update(keys, values, layer_idx)` and, in the
next statement, the function registered under `config._attn_implementation`. Our cache's `update`
hands the new tokens back and remembers them as *pending*. The function takes what is pending, and
so knows which layer of which cache it serves. Each attachment registers functions of its own.
"""

import functools
import logging
import threading
from collections.abc import Callable

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from headinfer.attend.native.kernel import NativeKernel
from headinfer.attend.select import select_kernels
from headinfer.attend.table import Kernels
from headinfer.engine.attending import attend_in_hand
from headinfer.engine.chunk import Chunk
from headinfer.errors import CacheStateError, HeadInferError, UnsupportedModelError
from headinfer.integration.autocast import in_attended_dtype
from headinfer.integration.pending import Pending
from headinfer.integration.support import HARMLESS_KEYWORDS
from headinfer.integration.turns import Turns
from headinfer.integration.visibility import Visible, check_visible, visible
from headinfer.kv.pair import KV
from headinfer.schedule.route import MAX_ASKED_TOKENS

_logger = logging.getLogger(__name__)


class _OfThread(threading.local):
    """A thread's pending tokens: set by the cache's `update`, taken by the next attention."""

    pending: Pending | None = None


class AttentionFunctions:
    """An attachment's attention function and mask function.

    Args:
        name: what they are registered under.
        turns: of the attachment.

    Attributes:
        name: of both functions in the registries.
        turns: of the attachment.
        padded: whether rows with padding are served.
    """

    def __init__(self, name: str, turns: Turns, *, padded: bool) -> None:
        self.name = name
        self.turns = turns
        self.padded = padded
        self._mine = _OfThread()
        self._warned = False

    def register(self) -> None:
        """Enter both functions, out of reach of torch.compile: nothing in them can be traced."""
        AttentionInterface.register(self.name, torch.compiler.disable(self.attend))
        AttentionMaskInterface.register(self.name, torch.compiler.disable(self.mask))

    def unregister(self) -> None:
        """Remove both functions; the registries have no call for that."""
        AttentionInterface._global_mapping.pop(self.name, None)
        AttentionMaskInterface._global_mapping.pop(self.name, None)

    def expect(self, pending: Pending) -> None:
        """Remember new tokens.

        Raises:
            HeadInferError: the ones before were never attended.
        """
        if self._mine.pending is not None:
            self.check_none_pending()
        self._mine.pending = pending

    def _warn_of_bypass(self) -> None:
        """Say once that tokens come in outside of a call that we serve."""
        if not self._warned:
            self._warned = True
            _logger.warning(
                "layers of the attached model are called, but not through its own forward: prompts "
                "are not chunked there, and take as much memory for activations as they need"
            )

    @property
    def pending(self) -> Pending | None:
        """The thread's new tokens that were not attended yet."""
        return self._mine.pending

    def forget_pending(self) -> None:
        """Forget new tokens that a call left behind."""
        self._mine.pending = None

    def check_none_pending(self) -> None:
        """Refuse to go on when new tokens were cached and no attention call took them.

        Raises:
            CacheStateError: another model than the attached one was called with its cache.
            UnsupportedModelError: the attached one did not attend.
        """
        if (pending := self._mine.pending) is not None:
            self._mine.pending = None
            if not pending.in_turn:
                raise CacheStateError(
                    "the model that was called is not the attached one that this cache belongs "
                    "to; attach it, too, and pass offload.new_cache() of its own attachment"
                )
            raise UnsupportedModelError(
                f"offloaded layer {pending.layer_idx} cached its keys without an attention call "
                "through the registry; this model cannot be served"
            )

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., torch.Tensor] = causal_mask_function,
        attention_mask: torch.Tensor | Visible | None = None,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        use_vmap: bool = False,
        **_kwargs: object,
    ) -> Visible | None:
        """Return what the layers that are given this mask see; None for all up to themselves.

        Raises:
            UnsupportedModelError: the model's mask is more than causal, windowed and padded, or
                its cache is static.
        """
        if kv_offset + kv_length > int(q_offset) + q_length:
            raise UnsupportedModelError(
                "this cache hands out memory beyond its tokens, as static ones do, and is not "
                "served by an attached model; leave cache_implementation out of the call and of "
                "model.generation_config, and pass offload.new_cache()"
            )
        if use_vmap or not allow_is_causal_skip:
            raise UnsupportedModelError(
                "this model's attention mask is more than causal, windowed and padded: not served"
            )
        return visible(
            q_length, kv_length, int(q_offset), kv_offset, mask_function, attention_mask, local_size
        )

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Visible | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, None]:
        """Serve one layer's attention; the signature is the registry's.

        Args:
            module: the calling layer.
            query: `[batch, query_heads, q_len, key_dim]`.
            key: `[batch, kv_heads, kv_len, key_dim]`; for an offloaded layer only the new tokens.
            value: `[batch, kv_heads, kv_len, value_dim]`, of the same tokens.
            attention_mask: what `mask` returned.
            scaling: factor of the scores; `key_dim ** -0.5` by default.
            dropout: must be 0.
            softcap: bound of the scores.
            s_aux: attention sinks `[query_heads]`.
            sliding_window: None, or the window that the mask has.
            is_causal: must not be False.
            **kwargs: must mean nothing to attention.

        Returns:
            `[batch, q_len, query_heads, value_dim]`, contiguous, and None for the weights.
        """
        pending, self._mine.pending = self._mine.pending, None
        if pending is not None and not pending.in_turn:
            self._warn_of_bypass()
        _check_call(module, (query, key, value), attention_mask, dropout, is_causal, kwargs)
        if pending is not None and (key is not pending.keys or value is not pending.values):
            raise UnsupportedModelError(
                f"{type(module).__name__} changes its keys between cache and attention, or "
                "shares them between layers: not served"
            )
        how = attention_mask, scaling, softcap, s_aux, sliding_window
        autocast = torch.is_autocast_enabled(query.device.type)
        if autocast or not query.dtype == key.dtype == value.dtype:
            query, key, value = in_attended_dtype(type(module).__name__, query, key, value)
        if autocast:  # kernels choose their own precision
            with torch.autocast(query.device.type, enabled=False):
                return self._attended(module, pending, query, key, value, *how), None
        return self._attended(module, pending, query, key, value, *how), None

    def _attended(
        self,
        module: torch.nn.Module,
        pending: Pending | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Visible | None,
        scaling: float | None,
        softcap: float | None,
        s_aux: torch.Tensor | None,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Return what `attend` does, of a call that was checked, in one dtype."""
        q_len, key_dim = query.shape[2:]
        scale = key_dim**-0.5 if scaling is None else float(scaling)
        sinks = None if s_aux is None else s_aux.unflatten(0, (value.shape[1], -1))
        window_tokens, padding = None, None
        kept = None if pending is None else pending.window_tokens
        if attention_mask is not None or sliding_window is not None or kept is not None:
            check_visible(module, attention_mask, sliding_window, query, key, pending)
            if attention_mask is not None:
                window_tokens, padding = attention_mask.window_tokens, attention_mask.padding
        if padding is not None and pending is not None and not self.padded:
            raise UnsupportedModelError(
                "rows with padding are not served where heads stream (sparsity), because their "
                "sinks would be padding; pass rows of one length, or one row at a time"
            )
        kernels = select_kernels(query.device, query.dtype, key_dim, value.shape[3], softcap)
        if pending is None:  # a cache that is not ours
            kv = KV(key, value)
            chunk = Chunk(
                window_tokens=window_tokens,
                tokens=q_len,
                queries=query,
                new=kv.cut(slice(kv.tokens - q_len, None)),
                kernels=kernels,
                scale=scale,
                padding=padding,
                sinks=sinks,
            )
            attend_in_hand(chunk, kv)
            return chunk.whole
        attend: Callable[..., torch.Tensor] = pending.engine.attend
        if not pending.in_turn:  # a layer that is called by itself
            attend = functools.partial(self.turns.run, attend)
        asks = q_len <= MAX_ASKED_TOKENS  # more make the host compute instead of read
        return attend(
            pending.layer_idx,
            query,
            key,
            value,
            kernels=kernels,
            scale=scale,
            window_tokens=window_tokens,
            padding=padding,
            sinks=sinks,
            host_kernels=_host_kernels(pending, query, softcap) if asks else None,
        )


def _host_kernels(pending: Pending, query: torch.Tensor, softcap: float | None) -> Kernels | None:
    """Return what attends on the CPU on behalf of a device; None where that is not planned.

    A share that was chosen by measurement is for the kernel that was measured, and no slower one.
    No prompt waits for a kernel to be compiled that it does not use.
    """
    plan, dims = pending.engine.plan, (query.shape[3], pending.values.shape[3])
    if not plan.host_share:
        return None
    kernels = select_kernels(torch.device("cpu"), query.dtype, *dims, softcap)
    if plan.host_share_adapts and not isinstance(kernels.kernels[0], NativeKernel):
        return None
    return kernels


def _check_call(
    module: torch.nn.Module,
    attended: tuple[torch.Tensor, ...],
    attention_mask: object,
    dropout: float,
    is_causal: bool | None,
    kwargs: dict[str, object],
) -> None:
    """Refuse a call whose result would be wrong."""
    name = type(module).__name__
    if kwargs.get("output_attentions"):
        raise UnsupportedModelError(
            "output_attentions=True is not served: the attention weights never exist as a whole"
        )
    for keyword, given in kwargs.items():
        if given is not None and keyword not in HARMLESS_KEYWORDS:
            raise UnsupportedModelError(
                f"{name} was given {keyword}, which attention here does not take into account"
            )
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{name} is not causal: not served")
    if attention_mask is not None and not isinstance(attention_mask, Visible):
        raise UnsupportedModelError(
            "an attention mask that is already 4-D is not served; pass a 2-D padding mask"
        )
    if dropout:
        raise HeadInferError("attention dropout is on: call model.eval() before generating")
    if torch.is_grad_enabled() and any(each.requires_grad for each in attended):
        raise HeadInferError(
            "gradients are on: run an attached model under torch.no_grad() or detach it to train"
        )
