"""What a model's masks let its layers see: everything, the padding left out, or a window.

Models make their masks through transformers, which asks the mask function registered for our
attention. What that returns goes from the model to its layers' attention calls. It is the only word
on what they see: stock eager attention and sdpa, which we must equal, look at nothing else. A
`sliding_window` keyword may come beside it, and some models leave it out.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.masking_utils import causal_mask_function

from headinfer.attend.masks import Padding
from headinfer.errors import UnsupportedModelError
from headinfer.integration.pending import Pending
from headinfer.units import counted


@dataclass(frozen=True, slots=True)
class Visible:
    """A description of what a forward pass's queries see in the layers that share a mask.

    No mask at all stands for everything up to the query itself.

    Attributes:
        q_len: queries the mask is for.
        kv_len: keys it is for; the last is the last query's own.
        window_tokens: tokens a query sees, its own included; None for all.
        padding: of those keys, or None.
        fault: why no layer can be served with it, or None; models make masks that they never use.
    """

    q_len: int
    kv_len: int
    window_tokens: int | None
    padding: Padding | None
    fault: str | None

    def to(self, where: torch.device | int | str) -> "Visible":
        """Return the mask on another device, as accelerate has all that a layer is given."""
        padding = self.padding
        if padding is None:
            return self
        valid = padding.valid.to(where)
        return dataclasses.replace(self, padding=dataclasses.replace(padding, valid=valid))

    @property
    def ndim(self) -> int:
        """Axes of the mask it stands for: some models pass a mask on to have it made once more."""
        return 4


def visible(
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: "torch.Tensor | Visible | None",
    window_tokens: int | None,
) -> Visible | None:
    """Return what a mask shows; None when that is everything up to the query itself.

    Args:
        q_length: queries.
        kv_length: keys.
        q_offset: position of the first query.
        kv_offset: position of the first key.
        mask_function: tells whether a position sees another.
        attention_mask: 2-D, of all tokens; or what was made for the same queries and keys before;
            or None.
        window_tokens: the window that the mask function is said to have, or None.

    Raises:
        UnsupportedModelError: the mask is more than causal, windowed and padded.
    """
    if window_tokens is None:
        plain = mask_function is causal_mask_function
    else:
        plain = _is_sliding(mask_function, window_tokens)
    if not plain:
        raise UnsupportedModelError(
            "this model's attention mask is more than causal, windowed and padded: not served"
        )
    padding = None
    if isinstance(attention_mask, Visible):
        made = attention_mask
        given = (made.q_len, made.kv_len, made.window_tokens)
        if given != (q_length, kv_length, window_tokens):
            raise UnsupportedModelError(
                "this model makes an attention mask of another one, which is for other tokens: not "
                "served"
            )
        return made
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[1] < kv_offset + kv_length:
            raise UnsupportedModelError(
                "the attention mask must be 2-D with at least "
                f"{counted(kv_offset + kv_length, 'column')}, one for each token, not of shape "
                f"{tuple(attention_mask.shape)}"
            )
        padding = Padding.of(attention_mask[:, kv_offset : kv_offset + kv_length].bool())
    fault = _fault(q_length, kv_length, q_offset, kv_offset, window_tokens)
    if window_tokens is None and padding is None and fault is None:
        return None
    return Visible(q_length, kv_length, window_tokens, padding, fault)


def _fault(
    q_length: int, kv_length: int, q_offset: int, kv_offset: int, window_tokens: int | None
) -> str | None:
    """Return what is wrong with a mask that is not for all keys its queries should see."""
    if window_tokens is not None and window_tokens < 1:
        return f"has a window of {window_tokens} tokens"
    first, end = q_offset, q_offset + q_length
    first = 0 if window_tokens is None else max(first - window_tokens + 1, 0)
    if kv_offset > first or kv_offset + kv_length != end:
        return (
            f"shows tokens {first} to {end}, but its cache keeps {kv_offset} to "
            f"{kv_offset + kv_length}"
        )
    return None


def _is_sliding(mask_function: Callable[..., torch.Tensor], window_tokens: int) -> bool:
    """Whether a mask function is a causal window, judged by its values around the edges of one."""
    queries, columns, expected = _edges(window_tokens)
    zero = torch.tensor(0, device="cpu")
    seen = mask_function(zero, zero, queries, columns)
    return torch.equal(seen.expand(expected.shape), expected)


@functools.lru_cache(maxsize=16)
def _edges(window_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, columns around both edges of their windows, and which of these they see.

    There are two queries, because chunks of as many tokens may look like windows to one.
    """
    queries = torch.arange(2, device="cpu")[:, None] + (window_tokens + 2)
    few = torch.arange(5, device="cpu")
    columns = torch.cat((few, few + window_tokens))[None, :]
    return queries, columns, (columns <= queries) & (columns > queries - window_tokens)


def check_visible(
    module: torch.nn.Module,
    visible: Visible | None,
    sliding_window: int | None,
    query: torch.Tensor,
    keys: torch.Tensor,
    pending: Pending | None,
) -> None:
    """Refuse a mask that says something else than the layer's keyword, its cache or its keys.

    Args:
        module: the calling layer.
        visible: its mask.
        sliding_window: the keyword it passes.
        query: its queries.
        keys: all of its keys, or the new ones alone where they are pending.
        pending: the new tokens of a cache of ours.
    """
    name = type(module).__name__
    window = None if visible is None else visible.window_tokens
    if sliding_window is not None and sliding_window != window:
        has = "no window" if window is None else f"a window of {window}"
        raise UnsupportedModelError(
            f"{name} passes a sliding window of {sliding_window} to its attention, but its mask "
            f"has {has}: not served"
        )
    if visible is not None and visible.fault is not None:
        raise UnsupportedModelError(f"the mask of {name} {visible.fault}: not served")
    if window is None and pending is not None and pending.window_tokens is not None:
        held = pending.engine.tokens(pending.layer_idx)
        if held >= pending.window_tokens:  # until then its cache layer has all of them
            raise UnsupportedModelError(
                f"the mask of {name} shows all of {counted(held, 'token')}, but its cache layer "
                f"keeps {pending.window_tokens - 1}: not served"
            )
    if visible is None:
        return
    if pending is not None and window is not None and window != pending.window_tokens:
        raise UnsupportedModelError(
            f"the mask of {name} shows {counted(window, 'token')}, but its cache layer is for "
            f"{pending.window_tokens or 'all'}: not served"
        )
    q_len, kv_len = query.shape[2], visible.kv_len if pending is not None else keys.shape[2]
    if (q_len, kv_len) != (visible.q_len, visible.kv_len):
        queries = "query" if q_len == 1 else "queries"
        raise UnsupportedModelError(
            f"{name} attends {counted(kv_len, 'key')} with {q_len} {queries}, but its mask is for "
            f"{visible.kv_len} and {visible.q_len}: not served"
        )
