"""Naming our attention in the configs of one model instance alone."""

import copy
from typing import Any

from transformers import PreTrainedModel


class AttachedName(str):
    """A name of our attention in a config; copies of the config name the attention it had."""

    original: str | None

    def __new__(cls, name: str, original: str | None) -> "AttachedName":
        """Make the name that stands in for `original`."""
        made = super().__new__(cls, name)
        made.original = original
        return made

    def __deepcopy__(self, _memo: dict[int, Any]) -> str | None:
        """Return the name the config had."""
        return self.original

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """Have the name the config had pickled."""
        return type(self.original), () if self.original is None else (self.original,)


class SwappedConfigs:
    """A set of copies of a model's configs in place of its own, from `swap` until `restore`.

    Other models that share the configs do not notice. What was made from a copy meanwhile goes on
    with the attention the model had, once that is restored.

    Args:
        model: whose modules' configs are swapped.
        name: what our attention is registered under.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        copies: dict[int, Any] = {}
        self._copies = copies
        config = copy.deepcopy(model.config, copies)
        self._modules = [
            (module, original)
            for module in model.modules()
            if id(original := module.__dict__.get("config")) in copies
        ]
        decoder = config.get_text_config(decoder=True)
        self._named = [(part, part._attn_implementation) for part in _with_parts(decoder)]
        self._name = name

    def swap(self) -> None:
        """Give the modules the copies, which name our attention."""
        for part, original in self._named:  # a config before its parts, to which it passes names on
            part._attn_implementation = AttachedName(self._name, original)
        for module, original in self._modules:
            module.config = self._copies[id(original)]

    def restore(self) -> None:
        """Give the modules their configs back, and the copies the attention they had."""
        for module, original in self._modules:
            module.config = original
        for part, original in self._named:
            part._attn_implementation = original
        self._modules, self._named, self._copies = [], [], {}


class OwnCacheKind:
    """A note of the cache that a model's generation config asks for, while ours is in its place.

    transformers' `generate` refuses to be given a cache where the config names one.

    Args:
        model: whose generation config it is.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = getattr(model, "generation_config", None)
        self._kind = getattr(self._config, "cache_implementation", None)

    def take_out(self) -> None:
        """Leave the choice of a cache to whoever calls `generate`."""
        if self._config is not None and self._kind is not None:
            self._config.cache_implementation = None

    def restore(self) -> None:
        """Put it back, unless another was chosen meanwhile."""
        if self._config is not None and self._config.cache_implementation is None:
            self._config.cache_implementation = self._kind


def _with_parts(config: Any) -> list[Any]:
    """Return a config and those within it."""
    parts = [getattr(config, key, None) for key in config.sub_configs]
    return [config, *(inner for part in parts if part is not None for inner in _with_parts(part))]
