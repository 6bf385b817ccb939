"""Our entries in transformers' attention and mask registries.

In every supported model a layer calls its cache's `update(keys, values, layer_idx)` and, in the
next statement, the function registered under `config._attn_implementation`. Our cache's `update`
hands the new tokens back and remembers them as *pending*; the function takes what is pending, and
so knows which layer of which cache it serves. Each attachment registers functions of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from headinfer.attend.masks import Padding, attend_band, attend_square, padding_of
from headinfer.attend.native.kernel import NativeKernel
from headinfer.attend.partial import Accumulator, Kernel
from headinfer.attend.select import select_kernel
from headinfer.engine.engine import Engine
from headinfer.errors import HeadInferError, UnsupportedModelError
from headinfer.integration.support import HARMLESS_KEYWORDS
from headinfer.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Pending:
    """New tokens an offloaded layer was given and that its attention must take next."""

    engine: Engine
    layer_idx: int
    keys: torch.Tensor
    values: torch.Tensor


class AttentionFunctions:
    """The attention and the mask function of one attachment.

    Attributes:
        name: what they are registered under.
        pending: set by the cache's `update`, taken by the next attention call.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.pending: Pending | None = None

    def register(self) -> None:
        """Enter both functions."""
        AttentionInterface.register(self.name, self.attend)
        AttentionMaskInterface.register(self.name, self.mask)

    def unregister(self) -> None:
        """Remove both functions; the registries have no call for that."""
        AttentionInterface._global_mapping.pop(self.name, None)
        AttentionMaskInterface._global_mapping.pop(self.name, None)

    def expect(self, pending: Pending) -> None:
        """Remember new tokens.

        Raises:
            UnsupportedModelError: the ones before were never attended.
        """
        self.check_none_pending()
        self.pending = pending

    def check_none_pending(self) -> None:
        """Refuse to go on when new tokens were cached and no attention call took them."""
        if self.pending is not None:
            layer_idx, self.pending = self.pending.layer_idx, None
            raise UnsupportedModelError(
                f"offloaded layer {layer_idx} cached its keys without an attention call through "
                "the registry; this model cannot be served"
            )

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., torch.Tensor] = causal_mask_function,
        attention_mask: torch.Tensor | None = None,
        local_size: int | None = None,
        allow_is_causal_skip: bool = True,
        use_vmap: bool = False,
        **_kwargs: object,
    ) -> Padding | None:
        """Return the padding alone: causality and windows follow from positions.

        Raises:
            UnsupportedModelError: the model's mask is more than causal, windowed and padded.
        """
        plain = mask_function is causal_mask_function
        if local_size is not None and not use_vmap:
            plain = _is_sliding(mask_function, local_size)
        if use_vmap or not allow_is_causal_skip or not plain:
            raise UnsupportedModelError(
                "this model's attention mask is more than causal, windowed and padded: not served"
            )
        if attention_mask is None:
            return None
        if attention_mask.ndim != 2 or attention_mask.shape[1] < kv_offset + kv_length:
            raise UnsupportedModelError(
                f"the attention mask must be 2-D with at least {kv_offset + kv_length} columns, "
                f"one for each token, not of shape {tuple(attention_mask.shape)}"
            )
        return Padding.of(attention_mask[:, kv_offset : kv_offset + kv_length].bool())

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Padding | None,
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
            value: `[batch, kv_heads, kv_len, value_dim]`, likewise.
            attention_mask: what `mask` returned.
            scaling: factor of the scores; `key_dim ** -0.5` by default.
            dropout: must be 0.
            softcap: bound of the scores.
            s_aux: attention sinks `[query_heads]`.
            sliding_window: tokens a query sees; None for all.
            is_causal: must not be False.
            **kwargs: must mean nothing to attention.

        Returns:
            `[batch, q_len, query_heads, value_dim]`, contiguous, and None for the weights.
        """
        pending, self.pending = self.pending, None
        _check_call(module, query, attention_mask, dropout, is_causal, kwargs)
        batch, query_heads, q_len, key_dim = query.shape
        kv_heads, value_dim = value.shape[1], value.shape[3]
        kernel = select_kernel(query.device, query.dtype, key_dim, value_dim, softcap)
        scale = key_dim**-0.5 if scaling is None else float(scaling)
        grouped = query.unflatten(1, (kv_heads, query_heads // kv_heads))
        sinks = None if s_aux is None else s_aux.unflatten(0, (kv_heads, -1))
        if pending is None:
            out = _attend_in_hand(
                kernel, grouped, key, value, scale, sliding_window, attention_mask, sinks
            )
        else:
            if key is not pending.keys or value is not pending.values:
                raise UnsupportedModelError(
                    f"{type(module).__name__} changes its keys between cache and attention, or "
                    "shares them between layers: not served"
                )
            if sliding_window is not None:
                raise UnsupportedModelError(
                    f"{type(module).__name__} has a sliding window, but a cache layer without one"
                )
            out = pending.engine.attend(
                pending.layer_idx,
                grouped,
                key,
                value,
                kernel=kernel,
                scale=scale,
                padding=attention_mask,
                sinks=sinks,
                host_kernel=_host_kernel(pending.engine.plan, query, value_dim, softcap),
            )
        return out.reshape(batch, q_len, query_heads, value_dim).contiguous(), None


def _host_kernel(
    plan: Plan, query: torch.Tensor, value_dim: int, softcap: float | None
) -> Kernel | None:
    """Return what attends on the CPU on behalf of a device; None where that is not planned.

    A share that was chosen by measurement is for the kernel that was measured, and no slower one.
    """
    if not plan.host_share:
        return None
    kernel = select_kernel(torch.device("cpu"), query.dtype, query.shape[-1], value_dim, softcap)
    if plan.host_share_adapts and not isinstance(kernel, NativeKernel):
        return None
    return kernel


def _is_sliding(mask_function: Callable[..., torch.Tensor], window_tokens: int) -> bool:
    """Whether a mask function is a causal window, judged by its value around the window's edge."""
    zero = torch.tensor(0)
    last = torch.tensor(window_tokens + 3)
    expected = {3: False, 4: True, window_tokens + 3: True, window_tokens + 4: False}
    return all(
        bool(mask_function(zero, zero, last, torch.tensor(column))) is visible
        for column, visible in expected.items()
    )


def _check_call(
    module: torch.nn.Module,
    query: torch.Tensor,
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
    unknown = [k for k, v in kwargs.items() if v is not None and k not in HARMLESS_KEYWORDS]
    if unknown:
        raise UnsupportedModelError(
            f"{name} was given {', '.join(sorted(unknown))}, which attention here does not take "
            "into account"
        )
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{name} is not causal: not served")
    if attention_mask is not None and not isinstance(attention_mask, Padding):
        raise UnsupportedModelError(
            "an attention mask that is already 4-D is not served; pass a 2-D padding mask"
        )
    if dropout:
        raise HeadInferError("attention dropout is on: call model.eval() before generating")
    if torch.is_grad_enabled() and query.requires_grad:
        raise HeadInferError(
            "gradients are on: run an attached model under torch.no_grad() or detach it to train"
        )


def _attend_in_hand(
    kernel: Kernel,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window_tokens: int | None,
    padding: Padding | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend keys that are all on the device: a sliding layer's window, or a cache not ours.

    Returns:
        `[batch, q_len, kv_heads, group, value_dim]`.
    """
    q_len, kv_len = query.shape[3], keys.shape[2]
    past = kv_len - q_len
    total = Accumulator()
    if window_tokens is not None:
        mask = padding_of(padding, 0, kv_len)
        total.add(
            attend_band(
                kernel,
                query,
                keys,
                values,
                scale=scale,
                window_tokens=window_tokens,
                padding=mask,
            )
        )
    else:
        own = padding_of(padding, past, kv_len)
        total.add(
            attend_square(
                kernel, query, keys[:, :, past:], values[:, :, past:], scale=scale, padding=own
            )
        )
        if past:
            mask = padding_of(padding, 0, past)
            total.add(
                kernel.attend(query, keys[:, :, :past], values[:, :, :past], scale=scale, mask=mask)
            )
    if sinks is not None:
        total.add_sinks(sinks)
    return total.result().out.to(query.dtype).permute(0, 3, 1, 2, 4)
