"""What a trial asks of a method, and the methods by name."""

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headinfer.bench import ours, stock
from headinfer.bench.catalogue import (
    AUTO,
    CHUNK_SIZES,
    COMPILED,
    DRAFTS,
    EAGER,
    FIXED,
    H2O,
    HEADS,
    HOST_ATTENTION,
    KEPT_PERCENT,
    LAYERS,
    OFFLOADED,
    ONE,
    QUANTISED_BACKENDS,
    STREAMING_LLM,
    SYNCHRONOUS,
    UNFUSED,
    chunked,
    with_host,
)
from headinfer.bench.drafted import Drafted
from headinfer.bench.evicting import methods as evicting
from headinfer.bench.held import Held
from headinfer.bench.quantised import Quantised
from headinfer.bench.spec import TrialSpec
from headinfer.estimate.methods import (
    ADAPTIVE,
    BOUNDED,
    CHUNKED,
    HEAD_WISE,
    HEAD_WISE_SPARSE,
    QUANTISED,
    RESIDENT,
    ROUNDED,
    STANDARD,
)


class Method(Protocol):
    """A way of inference on one model, in force until closed.

    Attributes:
        note: what a reader of its numbers must know; empty for nothing.
    """

    note: str

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache for up to `max_tokens` tokens."""

    def pass_tokens(self, context_tokens: int) -> int:
        """Return how many of a prompt's last tokens pass through the model at once."""

    def prefill(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Pass a prompt `[1, tokens]` through the model; return its last logits `[vocab]`."""

    def step(self, token: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Pass one token `[1, 1]` through the model; return its logits `[vocab]`."""

    def held(self, cache: Cache) -> Held:
        """Return where the KV of a used cache is."""

    def link_bytes(self) -> tuple[int, int]:
        """Return the bytes copied to the device so far, and those copied back, where counted."""

    def planned_activation_bytes(self, cache: Cache) -> int | None:
        """Return the bytes planned for activations with a used cache; None if nothing is."""

    def sizes(self, cache: Cache) -> dict[str, int] | None:
        """Return the sizes chosen for a used cache, by name; None if nothing is chosen."""

    def close(self) -> None:
        """Leave the model as it was."""


_EVICTING = {STREAMING_LLM: evicting.StreamingLLM, H2O: evicting.H2O}


def _evicting(name: str, percent: int) -> Callable[[PreTrainedModel, TrialSpec], Method]:
    method = _EVICTING[name.removesuffix(f"-{percent}")]
    return functools.partial(method, kept_share=percent / 100)


METHODS: dict[str, Callable[[PreTrainedModel, TrialSpec], Method]] = {
    STANDARD: stock.Standard,
    CHUNKED: stock.ChunkedPrefill,
    COMPILED: stock.Compiled,
    OFFLOADED: stock.Offloaded,
    QUANTISED: Quantised,
    **{name: functools.partial(Quantised, method=name) for name in QUANTISED_BACKENDS},
    **{name: _evicting(name, percent) for name, percent in KEPT_PERCENT.items()},
    **{f"{HEAD_WISE}-{heads}": ours.head_wise(heads) for heads in (8, 4, 2, 1)},
    ADAPTIVE: ours.adaptive,
    BOUNDED: ours.bounded,
    RESIDENT: ours.resident,
    EAGER: functools.partial(ours.resident, capture=False),
    UNFUSED: functools.partial(ours.resident, fuse="off"),
    FIXED: ours.fixed,
    HOST_ATTENTION: ours.host_attention,
    DRAFTS: Drafted,
    HEAD_WISE_SPARSE: ours.head_wise_sparse,
    **{
        name: functools.partial(ours.rounded, kv_cache=form.value) for form, name in ROUNDED.items()
    },
    SYNCHRONOUS: ours.synchronous,
    AUTO: ours.HeadInfer,
    **{chunked(size): functools.partial(ours.HeadInfer, chunk_tokens=size) for size in CHUNK_SIZES},
    **{
        with_host(name) if host else name: functools.partial(ours.spread, host=host)
        for name in (ONE, LAYERS, HEADS)
        for host in (False, True)
    },
}
"""The methods of the catalogue, made from a model and the trial."""
