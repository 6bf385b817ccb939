"""The layers of a cache that are transformers' own, such as recurrent states, as plain values."""

from collections.abc import Iterator
from typing import Any

import torch

from headinfer.errors import CacheStateError, SessionFileError

_PLAIN = (bool, int, float, str, type(None))


def described(layer: Any) -> dict[str, Any]:
    """Return a layer's attributes as values that JSON has.

    Tensors are named alone; `tensors` gives them.

    Raises:
        CacheStateError: the layer has something else.
    """
    return {name: _described(layer, name, value) for name, value in vars(layer).items()}


def _described(layer: Any, name: str, value: Any) -> Any:
    match value:
        case torch.Tensor():
            return {"kind": "tensor"}
        case torch.dtype():
            return {"kind": "dtype", "value": str(value).removeprefix("torch.")}
        case torch.device():
            return {"kind": "device"}
        case dict() if all(isinstance(key, int) for key in value):
            parts = {str(key): _described(layer, name, part) for key, part in value.items()}
            return {"kind": "numbered", "value": parts}
        case _ if isinstance(value, _PLAIN):
            return {"kind": "plain", "value": value}
    raise CacheStateError(
        f"a cache with layers of {type(layer).__name__} cannot be saved: {name} is a "
        f"{type(value).__name__}"
    )


def tensors(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a layer's tensors, each with a name for `restore`."""
    for name, value in vars(layer).items():
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, dict):
            for key, part in value.items():
                if isinstance(part, torch.Tensor):
                    yield f"{name}.{key}", part


def restore(
    layer: Any,
    values: dict[str, Any],
    saved: dict[str, torch.Tensor],
    device: torch.device,
    written_by: str,
) -> None:
    """Give a new layer the attributes that another one had.

    Args:
        layer: of the same kind; changed in place.
        values: from `described`.
        saved: from `tensors`, by name; copied.
        device: where its tensors are to be.
        written_by: the version of transformers that it was, for messages.

    Raises:
        SessionFileError: layers of this version of transformers are others.
    """
    if values.keys() != vars(layer).keys():
        unlike = sorted(values.keys() ^ vars(layer).keys())
        raise SessionFileError(
            f"the session was saved with transformers {written_by}, whose "
            f"{type(layer).__name__} has other attributes ({', '.join(unlike)}); use that version"
        )

    def made(name: str, value: dict[str, Any]) -> Any:
        match value["kind"]:
            case "tensor":
                return saved[name].to(device, copy=True)
            case "dtype":
                return getattr(torch, value["value"])
            case "device":
                return device
            case "numbered":
                return {
                    int(key): made(f"{name}.{key}", part) for key, part in value["value"].items()
                }
        return value["value"]

    for name, value in values.items():
        setattr(layer, name, made(name, value))
