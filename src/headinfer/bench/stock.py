"""What people use instead: the caches of transformers."""

import gc

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers import CompileConfig, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from headinfer.bench.held import Held
from headinfer.bench.spec import TrialSpec
from headinfer.errors import HeadInferError, UnsupportedModelError, reason_of
from headinfer.integration.calls import cache_argument, last_logits
from headinfer.plan.choices import chunk_sizes
from headinfer.plan.options import Options
from headinfer.units import counted_tokens

_REHEARSED_STEPS = 4
"""Steps taken before any is timed. The first one compiles, and the second one again where windows
count their tokens in Python. The third one may warm up, and the fourth one record a CUDA graph."""


class Standard:
    """A run of stock transformers: `DynamicCache`, sdpa attention, the prompt in one pass."""

    def __init__(self, model: PreTrainedModel, spec: TrialSpec) -> None:
        self._model = model
        self._spec = spec
        self.note = ""
        if spec.settings.device == "simulated":
            self.note = "on the CPU: the simulated device is HeadInfer's own"

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache."""
        return DynamicCache(config=self._model.config)

    def pass_tokens(self, context_tokens: int) -> int:
        """Return all of them."""
        return context_tokens

    def prefill(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Pass a prompt through the model in one call."""
        return last_logits(self._model, tokens, cache)

    def step(self, token: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Pass one token through the model."""
        return last_logits(self._model, token, cache)

    def held(self, cache: Cache) -> Held:
        """Return the bytes of the cache's tensors, by where they are."""
        tensors = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        on_host = sum(int(part.nbytes) for part in tensors if part.device.type == "cpu")
        return Held(
            host_bytes=on_host, device_bytes=sum(int(part.nbytes) for part in tensors) - on_host
        )

    def link_bytes(self) -> tuple[int, int]:
        """Return zeros: nothing is counted."""
        return 0, 0

    def planned_activation_bytes(self, cache: Cache) -> int | None:
        """Return None: nothing is planned."""

    def sizes(self, cache: Cache) -> dict[str, int] | None:
        """Return None: nothing is chosen."""

    def close(self) -> None:
        """Do nothing."""


class ChunkedPrefill(Standard):
    """A `generate` with `prefill_chunk_size`: all of the cache on the device, less activations."""

    def __init__(self, model: PreTrainedModel, spec: TrialSpec) -> None:
        super().__init__(model, spec)
        given = spec.settings.chunk_tokens
        default = chunk_sizes(Options(), "cuda", None)[0]
        self._chunk_tokens = default if given == "auto" else given
        self.note = f"chunks of {counted_tokens(self._chunk_tokens)}"

    def pass_tokens(self, context_tokens: int) -> int:
        """Return the tokens of a chunk."""
        return min(self._chunk_tokens, context_tokens)

    def prefill(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Generate one token, whose logits are those of the prompt."""
        if cache.get_seq_length():  # only a last chunk is left to pass
            return super().prefill(tokens, cache)
        output = self._model.generate(
            tokens,
            **cache_argument(self._model, cache),
            prefill_chunk_size=self._chunk_tokens,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        row: torch.Tensor = output.logits[0][0]
        return row

    def sizes(self, cache: Cache) -> dict[str, int] | None:
        """Return the chunk."""
        return {"chunk_tokens": self._chunk_tokens}


class Compiled(Standard):
    """A static cache and compiled decode steps, as `generate` has with `cache_implementation`.

    Prompts pass eagerly, as there: code is compiled for one number of tokens.
    """

    def __init__(self, model: PreTrainedModel, spec: TrialSpec) -> None:
        super().__init__(model, spec)
        # What `get_compiled_call` of transformers makes, but not left in the model.
        self._compiled = torch.compile(model.__call__, **CompileConfig().to_dict())

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache whose decode steps are compiled by now.

        Steps are compiled for one size of the cache, and CUDA graphs recorded for one place of it.
        So every cache holds all tokens of the trial, and some steps are rehearsed in each.

        Raises:
            HeadInferError: the steps cannot be compiled.
        """
        cache = StaticCache(config=self._model.config, max_cache_len=self._spec.all_tokens)
        try:
            self._rehearse(cache)
        except TorchDynamoException as error:
            raise HeadInferError(f"torch.compile failed: {reason_of(error)}") from error
        cache.reset()
        gc.collect()  # compiling leaves cycles that would keep this cache beside the next
        return cache

    def step(self, token: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Pass one token through the compiled model."""
        token = token.clone(memory_format=torch.contiguous_format)  # other strides compile anew
        row = last_logits(self._model, token, cache, call=self._compiled)
        return row.clone()  # the next replay of a CUDA graph writes over it

    def _rehearse(self, cache: Cache) -> None:
        """Take the decode steps before those of the trial, on a cache of zeros."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self._model.device)
        super().prefill(token, cache)  # eagerly, to make the tensors
        start = max(self._spec.context_tokens - _REHEARSED_STEPS, 0)
        _set_length(cache, start)
        for _ in range(min(_REHEARSED_STEPS, self._spec.all_tokens - start)):
            self.step(token, cache)


def _set_length(cache: Cache, tokens: int) -> None:
    """Let a static cache hold so many tokens, whatever they are."""
    for layer in cache.layers:
        if isinstance(layer, StaticLayer):
            layer.cumulative_length.fill_(tokens)
        if isinstance(layer, StaticSlidingWindowLayer):
            layer.cumulative_length_int = tokens


class Offloaded(Standard):
    """An offload as transformers has it: whole layers to host memory and back."""

    def __init__(self, model: PreTrainedModel, spec: TrialSpec) -> None:
        super().__init__(model, spec)
        if model.device.type != "cuda":
            raise UnsupportedModelError(
                "transformers offloads its cache through CUDA streams; it needs a GPU"
            )

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache that keeps one layer on the device and fetches the next."""
        return DynamicCache(config=self._model.config, offloading=True)

    def held(self, cache: Cache) -> Held:
        """Return the bytes of the cache's tensors; every layer's cross the link."""
        held = super().held(cache)
        return Held(
            host_bytes=held.host_bytes,
            device_bytes=held.device_bytes,
            streamed_bytes=held.host_bytes + held.device_bytes,
        )
