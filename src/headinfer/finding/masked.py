"""A reference for streaming heads: a stock model that attends with a mask of its own for each head.

It keeps all tokens and saves nothing. What it computes is what an engine that keeps fewer tokens
must compute.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from headinfer.errors import OptionError, UnsupportedModelError
from headinfer.finding.attention import LayerCall, attending_by
from headinfer.integration.model_shape import model_shape
from headinfer.integration.support import check_architecture
from headinfer.plan.shape import LayerKind
from headinfer.units import counted


@contextmanager
def masked_heads(
    model: PreTrainedModel,
    streaming: Sequence[Collection[int]],
    *,
    sink_tokens: int,
    recent_tokens: int,
) -> Iterator[None]:
    """Have a model attend with streaming heads inside the `with` statement.

    A query at position i of a streaming head sees tokens j < `sink_tokens` and those of
    i - `recent_tokens` < j <= i. Positions count the columns of a padded batch. All other heads see
    what the model's mask shows, and so do streaming heads within their reach.

    Args:
        model: a causal language model of transformers, not attached. Its caches must be dynamic.
        streaming: KV heads that stream, for each decoder layer.
        sink_tokens: first tokens that each query sees, at least 0.
        recent_tokens: newest tokens that each query sees, its own included, at least 1.

    Raises:
        OptionError: a head, a layer or a count of tokens is out of range.
        UnsupportedModelError: the model cannot attend this way, or a streaming head lies in a layer
            that does not attend all tokens.
    """
    check_architecture(model)
    _check(model, streaming, sink_tokens, recent_tokens)

    def attend(call: LayerCall) -> torch.Tensor:
        heads = streaming[call.layer]
        if not heads:
            return call.attend()
        full = torch.ones(call.keys.shape[1], dtype=torch.bool, device=call.keys.device)
        full[list(heads)] = False
        parts = []
        for rows in call.blocks:
            near = within_reach(call, rows, sink_tokens, recent_tokens)
            seen = call.seen[..., rows, :] & (near | full[:, None, None, None])
            parts.append(call.attended(call.weights(rows, seen)))
        return torch.cat(parts, -2)

    with attending_by(model, attend):
        yield


def within_reach(
    call: LayerCall, rows: slice, sink_tokens: int, recent_tokens: int
) -> torch.Tensor:
    """Return which keys queries of a streaming head see, `[rows, kv_len]`; of later ones also."""
    distances = call.distances(rows)
    sinks = torch.arange(distances.shape[1], device=distances.device) < sink_tokens
    return sinks | (distances < recent_tokens)


def _check(
    model: PreTrainedModel,
    streaming: Sequence[Collection[int]],
    sink_tokens: int,
    recent_tokens: int,
) -> None:
    layers = model_shape(model).layers
    if len(streaming) != len(layers):
        raise OptionError(
            f"streaming heads are given for {counted(len(streaming), 'layer')}, but the model has "
            f"{len(layers)}"
        )
    for number, (heads, layer) in enumerate(zip(streaming, layers, strict=True)):
        if heads and layer.kind is not LayerKind.FULL:
            raise UnsupportedModelError(
                f"layer {number} does not attend all tokens, so none of its heads can stream"
            )
        for head in heads:
            if not 0 <= head < layer.kv_heads:
                raise OptionError(
                    f"layer {number} has {counted(layer.kv_heads, 'KV head')}, and no {head}"
                )
    if sink_tokens < 0 or recent_tokens < 1:
        raise OptionError(
            "sink_tokens must be at least 0 and recent_tokens at least 1, not "
            f"{sink_tokens} and {recent_tokens}"
        )
