"""The ways of inference a benchmark compares, each in force on one model until closed."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from headinfer.api import attach
from headinfer.bench.spec import Settings


class Method(Protocol):
    """One way of inference on one model."""

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache for up to `max_tokens` tokens."""

    def kv_bytes(self, cache: Cache) -> tuple[int, int]:
        """Return the bytes of KV held in host memory, and on the device."""

    def link_bytes(self) -> tuple[int, int]:
        """Return the bytes copied to the device so far, and those copied back."""

    def planned_activation_bytes(self, tokens: int) -> int | None:
        """Return the bytes planned for activations at `tokens` tokens; None if nothing is."""

    def sizes(self, tokens: int) -> dict[str, int] | None:
        """Return the sizes chosen for `tokens` tokens, by name; None if nothing is chosen."""

    def close(self) -> None:
        """Leave the model as it was."""


class Standard:
    """Stock transformers: `DynamicCache`, sdpa attention, the prompt in one go."""

    def __init__(self, model: PreTrainedModel, _settings: Settings) -> None:
        self._config = model.config
        self._on_device = model.device.type != "cpu"

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty `DynamicCache`."""
        return DynamicCache(config=self._config)

    def kv_bytes(self, cache: Cache) -> tuple[int, int]:
        """Return the bytes of the cache's tensors, where the model is."""
        held = sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers)
        return (0, held) if self._on_device else (held, 0)

    def link_bytes(self) -> tuple[int, int]:
        """Return zeros: nothing is copied."""
        return 0, 0

    def planned_activation_bytes(self, tokens: int) -> int | None:
        """Return None: nothing is planned."""

    def sizes(self, tokens: int) -> dict[str, int] | None:
        """Return None: nothing is chosen."""

    def close(self) -> None:
        """Do nothing."""


class HeadInfer:
    """HeadInfer, attached to the model."""

    def __init__(self, model: PreTrainedModel, settings: Settings) -> None:
        self._offload = attach(model, **asdict(settings))

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache with its host memory reserved."""
        return self._offload.new_cache(max_tokens)

    def kv_bytes(self, cache: Cache) -> tuple[int, int]:
        """Return the bytes of the host store and of the device arena."""
        stats = self._offload.stats
        return stats.host_kv_bytes, stats.peak_device_kv_bytes

    def link_bytes(self) -> tuple[int, int]:
        """Return the bytes copied since the attachment."""
        stats = self._offload.stats
        return stats.bytes_to_device, stats.bytes_to_host

    def planned_activation_bytes(self, tokens: int) -> int | None:
        """Return the plan's estimate."""
        return self._offload.plan_for(1, tokens).activation_bytes

    def sizes(self, tokens: int) -> dict[str, int] | None:
        """Return the chunk and the tile of the plan; a tile never split has the tokens given."""
        plan = self._offload.plan_for(1, tokens)
        return {
            "chunk_tokens": plan.chunk_tokens,
            "tile_heads": plan.tile_heads,
            "tile_tokens": min(plan.tile_tokens, tokens),
        }

    def close(self) -> None:
        """Detach."""
        self._offload.detach()


METHODS: dict[str, Callable[[PreTrainedModel, Settings], Method]] = {
    "standard": Standard,
    "headinfer": HeadInfer,
}
"""Methods by name, made from a model and the settings."""
