"""Reading the values of a model's config.json, with every mistake in it told in one line."""

from collections.abc import Mapping
from dataclasses import dataclass

from headinfer.errors import ModelLoadError

_OTHER_NAMES = {"num_experts": "num_local_experts"}
"""Some configs call a value so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """A decoder's config: its values, those it leaves out included.

    Attributes:
        name: of the model, for messages.
        values: by key; a key that is missing and one that is null mean the same.
    """

    name: str
    values: Mapping[str, object]

    def get(self, key: str) -> object:
        """Return a value; None if there is none."""
        value = self.values.get(key)
        return self.values.get(_OTHER_NAMES.get(key, key)) if value is None else value

    def flag(self, key: str | bool) -> bool:
        """Return whether a key's value is true; a key that is itself a bool is the answer."""
        return key if isinstance(key, bool) else bool(self.get(key))

    def number(self, key: str, default: int | None = None) -> int:
        """Return a value that must be a whole number, 0 or more.

        Args:
            key: of the value.
            default: what stands for a missing value; None if it must be there.

        Raises:
            ModelLoadError: the value is missing or something else.
        """
        value = default if self.get(key) is None else self.get(key)
        if value is None:
            raise ModelLoadError(f"the config of {self.name!r} has no {key}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._refusal(key, value, "a whole number, 0 or more")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a value that must be a whole number of at least 1, as `number` does."""
        value = self.number(key, default)
        if value == 0:
            raise self._refusal(key, value, "positive")
        return value

    def items(self, key: str) -> list[object]:
        """Return a value that must be a list; an empty one if it is missing.

        Raises:
            ModelLoadError: it is something else.
        """
        value = self.get(key)
        if value is not None and not isinstance(value, list | tuple):
            raise self._refusal(key, value, "a list")
        return list(value or ())

    def section(self, key: str) -> Mapping[str, object]:
        """Return a value that must be a mapping; an empty one if it is missing.

        Raises:
            ModelLoadError: it is something else.
        """
        value = self.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self._refusal(key, value, "a mapping")
        return value or {}

    def _refusal(self, key: str, value: object, wanted: str) -> ModelLoadError:
        return ModelLoadError(
            f"{key} in the config of {self.name!r} must be {wanted}, not {value!r}"
        )

    @property
    def head_dim(self) -> int:
        """Elements of one head's key, query or value.

        Raises:
            ModelLoadError: the config does not say, or has more heads than elements.
        """
        derived = self.size("hidden_size") // self.size("num_attention_heads")
        return self.size("head_dim", derived)

    @property
    def kv_heads(self) -> int:
        """Key/value heads of an attention layer.

        Raises:
            ModelLoadError: the query heads do not divide by them.
        """
        query_heads = self.size("num_attention_heads")
        kv_heads = self.size("num_key_value_heads", query_heads)
        if query_heads % kv_heads:
            raise self._refusal("num_key_value_heads", kv_heads, f"a divisor of {query_heads}")
        return kv_heads
