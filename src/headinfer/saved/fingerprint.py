"""What a session's model is known by: its config and samples of its weights.

Each tensor of weights gives up to 256 elements, at equal distances. So the time that it takes goes
by the number of tensors, and not by their size.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_SAMPLES = 256
"""Elements of one tensor that are looked at; a smaller tensor is looked at as a whole."""

_SHOWN = 3
"""Differences that a message names."""

_NO_MATTER = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "experts_implementation",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Keys of a config that say nothing about keys and values: paths, ids and forms of output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """A fingerprint of a model.

    Attributes:
        config: what of its config matters, rotary settings included, by names with dots.
        dtype: of the model.
        weights: for each tensor its dtype, its shape and a hash of samples.
        transformers: the version, whose configs may have other keys than those of another one.
    """

    config: dict[str, Any]
    dtype: str
    weights: dict[str, str]
    transformers: str

    def difference(self, other: "Fingerprint") -> str | None:
        """Return in words how another model differs; None where it does not.

        Args:
            other: of the session. With another version of transformers only those keys of its
                config are compared that both have.
        """
        if self.dtype != other.dtype:
            return f"its dtype is {other.dtype}, and here it is {self.dtype}"
        keys = self.config.keys() & other.config.keys()
        if self.transformers == other.transformers:
            keys = self.config.keys() | other.config.keys()
        told = [
            f"{key} is {other.config.get(key)!r} and here {self.config.get(key)!r}"
            for key in sorted(keys)
            if self.config.get(key) != other.config.get(key)
        ]
        if told:
            return f"in its config {_some(told, '; ')}"
        names = sorted(self.weights.keys() | other.weights.keys())
        differing = [name for name in names if self.weights.get(name) != other.weights.get(name)]
        if differing:
            return f"its weights differ in {_some(differing, ', ')}"
        return None


def _some(told: list[str], between: str) -> str:
    more = len(told) - _SHOWN
    return between.join(told[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def fingerprint(model: Any, version: str) -> Fingerprint:
    """Return the fingerprint of a model of transformers.

    Args:
        model: with its weights; where they are does not matter.
        version: of transformers.
    """
    return Fingerprint(
        config=dict(_flat("", json.loads(json.dumps(model.config.to_dict(), default=str)))),
        dtype=str(model.dtype).removeprefix("torch."),
        weights={name: _described(tensor) for name, tensor in model.named_parameters()},
        transformers=version,
    )


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values of a config that matter, those of its parts by names with dots."""
    for key, value in values.items():
        if key in _NO_MATTER or key.startswith("_"):
            continue
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


@torch.no_grad()
def _described(tensor: torch.Tensor) -> str:
    """Return dtype, shape and a hash of samples of a tensor."""
    shape = ",".join(map(str, tensor.shape))
    what = f"{str(tensor.dtype).removeprefix('torch.')}[{shape}]"
    if tensor.device.type == "meta" or not tensor.numel():
        return what
    samples = min(_SAMPLES, tensor.numel())
    # Computed as whole numbers: a float of 32 bits does not have all positions.
    places = torch.arange(samples) * (tensor.numel() - 1) // max(samples - 1, 1)
    places = places.to(tensor.device)
    taken = tensor[torch.unravel_index(places, tensor.shape)] if tensor.ndim else tensor[None]
    data = taken.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{what} {hashlib.blake2b(data, digest_size=8).hexdigest()}"
