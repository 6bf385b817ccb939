"""Attention of one model instance, done here: plainly, so that its weights can be seen or changed.

Stock attention hides its weights or holds all of them at once. Here they come in blocks of queries,
so that a context of many tokens takes little memory.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from headinfer.errors import UnsupportedModelError
from headinfer.integration.configs import SwappedConfigs
from headinfer.integration.support import HARMLESS_KEYWORDS, check_architecture, layer_index

BLOCK_ELEMENTS = 2**24
"""The most attention weights that are held at once."""

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """A call of a layer's attention.

    Attributes:
        layer: which of the model's layers.
        query: `[batch, kv_heads, group, q_len, key_dim]`.
        keys: `[batch, kv_heads, kv_len, key_dim]`; the last is the last query's own.
        values: `[batch, kv_heads, kv_len, value_dim]`.
        seen: what the model's mask shows, `[batch, 1, 1, q_len, kv_len]`, as booleans.
        scale: factor of the scores.
        softcap: bound of the scores, or None.
        sinks: a score `[kv_heads, group]` that each query has beside those of its keys, or None.
    """

    layer: int
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def blocks(self) -> list[slice]:
        """Queries that are attended at once, block by block."""
        batch, kv_heads, group, q_len, _ = self.query.shape
        rows = max(1, BLOCK_ELEMENTS // (batch * kv_heads * group * self.keys.shape[2]))
        return [slice(at, min(at + rows, q_len)) for at in range(0, q_len, rows)]

    def distances(self, rows: slice) -> torch.Tensor:
        """Return how many tokens before each query a key lies, `[rows, kv_len]`."""
        q_len, kv_len = self.query.shape[3], self.keys.shape[2]
        places = torch.arange(kv_len, device=self.keys.device)
        return (places[rows] + (kv_len - q_len))[:, None] - places

    def weights(self, rows: slice, seen: torch.Tensor | None = None) -> torch.Tensor:
        """Return attention weights of some queries.

        Args:
            rows: the queries.
            seen: which keys they see, in a shape that broadcasts to the weights'; by default all
                that the mask shows.

        Returns:
            `[batch, kv_heads, group, rows, kv_len]`, float32.
        """
        scores = torch.matmul(self.query[..., rows, :], self.keys[:, :, None].transpose(-1, -2))
        scores = scores * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        seen = self.seen[..., rows, :] if seen is None else seen
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
        if self.sinks is None:
            return scores.softmax(-1, dtype=torch.float32)
        sinks = self.sinks[None, :, :, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sinks), -1).softmax(-1, dtype=torch.float32)[..., :-1]

    def attended(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the values that weights are of, `[batch, kv_heads, group, rows, value_dim]`."""
        return torch.matmul(weights.to(self.values.dtype), self.values[:, :, None])

    def attend(self) -> torch.Tensor:
        """Return the attention of all queries, as the model has it."""
        return torch.cat([self.attended(self.weights(rows)) for rows in self.blocks], -2)


Attend = Callable[[LayerCall], torch.Tensor]


@contextmanager
def attending_by(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Have a model attend by a function inside the `with` statement.

    Caches must be dynamic, as transformers makes them. Other models are not affected, and the model
    is as before afterwards.

    Args:
        model: a causal language model of transformers, not attached.
        attend: given each call of a layer's attention, returns `[batch, kv_heads, group, q_len,
            value_dim]`.

    Raises:
        UnsupportedModelError: the model's attention does not go through transformers' registry, or
            takes something into account that is not known here.
    """
    check_architecture(model)
    name = f"headinfer-finding-{next(_numbers)}"

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **keywords: object,
    ) -> tuple[torch.Tensor, None]:
        _check_call(module, keywords)
        kv_heads = key.shape[1]
        call = LayerCall(
            layer=layer_index(module),
            query=query.unflatten(1, (kv_heads, -1)),
            keys=key,
            values=value,
            seen=attention_mask[:, :, None, :, -key.shape[2] :],
            scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=softcap,
            sinks=None if s_aux is None else s_aux.unflatten(0, (kv_heads, -1)),
        )
        out = attend(call)
        return out.flatten(1, 2).transpose(1, 2).contiguous(), None

    configs = SwappedConfigs(model, name)
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, _mask)
    try:
        configs.swap()
        yield
    finally:
        configs.restore()
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def _check_call(module: torch.nn.Module, keywords: dict[str, object]) -> None:
    """Refuse keywords of an attention call that would change its result."""
    # The mask says what the layer sees, as in stock eager attention; a window comes twice.
    given = {name: value for name, value in keywords.items() if name != "sliding_window"}
    if given.pop("dropout", 0.0) or given.pop("is_causal", None) is False:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with dropout, or not causally; call eval() first"
        )
    unknown = {name for name, value in given.items() if value is not None} - HARMLESS_KEYWORDS
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention, "
            "which is not taken into account here"
        )


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., torch.Tensor] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **keywords: object,
) -> torch.Tensor:
    """Return transformers' mask of booleans, also where another kernel could do without one."""
    if kv_offset + kv_length > int(q_offset) + q_length:
        raise UnsupportedModelError(
            "this cache hands out memory beyond its tokens, as static ones do; give a dynamic one"
        )
    keywords |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: torch.Tensor = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        **keywords,
    )
    return mask
