"""Attention in plain torch, with its probabilities, and its place in one model's config."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from headinfer.errors import UnsupportedModelError
from headinfer.integration.configs import SwappedConfigs
from headinfer.integration.visibility import Visible, visible

_SCORES_BYTES = 64 * 2**20
"""The most that the scores of the queries attended at once take."""

_numbers = itertools.count()


class InConfig:
    """An attention function in one model's config, from construction until `remove`.

    Args:
        model: whose layers call the function.
        attend: with the signature of transformers' registry. Its mask is a `Visible`, or None.
    """

    def __init__(self, model: PreTrainedModel, attend: Callable[..., Any]) -> None:
        self._name = f"headinfer_evicting_{next(_numbers)}"
        AttentionInterface.register(self._name, attend)
        AttentionMaskInterface.register(self._name, _mask)
        self._configs = SwappedConfigs(model, self._name)
        self._configs.swap()

    def remove(self) -> None:
        """Leave the model as it was; may be called again."""
        self._configs.restore()
        AttentionInterface._global_mapping.pop(self._name, None)
        AttentionMaskInterface._global_mapping.pop(self._name, None)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: "torch.Tensor | Visible | None" = None,
    local_size: int | None = None,
    **_keywords: object,
) -> Visible | None:
    return visible(
        q_length, kv_length, int(q_offset), kv_offset, mask_function, attention_mask, local_size
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of one layer's attention, of one text.

    Attributes:
        query: `[kv_heads, group, q_len, head_dim]`.
        keys: `[kv_heads, kv_len, head_dim]`, the new tokens last.
        values: `[kv_heads, kv_len, value_dim]`.
        scale: factor of the scores.
        softcap: bound of the scores, or None.
        sinks: the model's own scores `[kv_heads, group]` for nothing at all, or None.
        window_tokens: tokens a query sees where the model says so, itself included, or None.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None
    window_tokens: int | None

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Visible | None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_keywords: object,
    ) -> "Call":
        """Return the call that a layer makes of the registry.

        Raises:
            UnsupportedModelError: several texts, padding, or a mask for other tokens.
        """
        if len(query) > 1 or (attention_mask is not None and attention_mask.padding is not None):
            raise UnsupportedModelError("methods that drop tokens take one text, without padding")
        if attention_mask is not None and attention_mask.fault is not None:
            raise UnsupportedModelError(f"this model's mask {attention_mask.fault}: not served")
        kv_heads = key.shape[1]
        return cls(
            query=query[0].unflatten(0, (kv_heads, -1)),
            keys=key[0],
            values=value[0],
            scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=softcap,
            sinks=None if s_aux is None else s_aux.unflatten(0, (kv_heads, -1)),
            window_tokens=None if attention_mask is None else attention_mask.window_tokens,
        )

    def seen(self) -> torch.Tensor:
        """Return which keys queries see `[q_len, kv_len]`: those before them, in their window."""
        q_len, kv_len = self.query.shape[2], self.keys.shape[1]
        places = torch.arange(kv_len, device=self.keys.device)
        queries = places[kv_len - q_len :, None]
        seen = places <= queries
        return (
            seen if self.window_tokens is None else seen & (places > queries - self.window_tokens)
        )

    def attend(
        self,
        seen: torch.Tensor,
        *,
        turned: torch.Tensor | None = None,
        turned_keys: int = 0,
        tell: Callable[[torch.Tensor], object] = lambda _probabilities: None,
    ) -> torch.Tensor:
        """Attend in float32, as many queries at once as memory is meant for.

        Args:
            seen: which keys each query sees `[q_len, kv_len]`.
            turned: other queries, in the form of `query`, that meet the first keys.
            turned_keys: how many keys these are.
            tell: called with probabilities `[kv_heads, group, some of the queries, kv_len]`.

        Returns:
            What a layer is given, `[1, q_len, query_heads, value_dim]`.
        """
        kv_heads, group, q_len, _ = self.query.shape
        keys, values = self.keys.float().mT, self.values.float()
        out = self.query.new_empty(kv_heads, group, q_len, values.shape[-1])
        most = max(1, _SCORES_BYTES // (4 * kv_heads * group * self.keys.shape[1]))
        for first in range(0, q_len, most):
            rows = slice(first, first + most)
            scores = _product(self.query[:, :, rows].float(), keys)
            if turned is not None:
                first_keys = keys[..., :turned_keys]
                scores[..., :turned_keys] = _product(turned[:, :, rows].float(), first_keys)
            probabilities = self._probabilities(scores, seen[rows])
            tell(probabilities)
            out[:, :, rows] = _product(probabilities, values).to(out.dtype)
        return out.flatten(0, 1).transpose(0, 1)[None].contiguous()

    def _probabilities(self, scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        scores = scores * self.scale
        if self.softcap is not None:
            scores = self.softcap * (scores / self.softcap).tanh()
        scores.masked_fill_(~seen, -torch.inf)
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.float()[:, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]


def _product(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Return the product of a group's rows and its KV head's matrix, which is not copied for it."""
    product: torch.Tensor = (rows.flatten(1, 2) @ matrices).unflatten(1, rows.shape[1:3])
    return product
