"""Layers that are spread over several devices: simulated ones, or GPUs."""

from typing import Any

import torch
from transformers import PreTrainedModel

from headinfer.device.simulated import SimulatedDevice


def spread(*layers: int, seed: int = 0) -> list[SimulatedDevice]:
    """Return a device for each layer, from the numbers of the devices."""
    devices = {number: SimulatedDevice(seed=seed + number) for number in sorted(set(layers))}
    return [devices[number] for number in layers]


def device_map(model: PreTrainedModel, gpu_of_layer: list[int | str]) -> dict[str, int | str]:
    """Return a map for accelerate: layers as given, the norm with the last, the rest on GPU 0."""
    inside: Any = model.model
    places: dict[str, int | str] = {
        f"model.{name}": 0 for name, _ in inside.named_children() if name != "layers"
    }
    places |= {f"model.layers.{number}": gpu for number, gpu in enumerate(gpu_of_layer)}
    gpus = [gpu for gpu in gpu_of_layer if isinstance(gpu, int)]
    places |= {"model.norm": gpus[-1] if gpus else 0}
    return places | {name: 0 for name, _ in model.named_children() if name != "model"}


def split_over_gpus(model: PreTrainedModel, gpu_of_layer: list[int]) -> PreTrainedModel:
    """Spread a model's layers by accelerate."""
    import accelerate

    places = device_map(model, list(gpu_of_layer))
    return accelerate.dispatch_model(model, places, skip_keys=["past_key_values", "cache"])


def split_by_hand(model: PreTrainedModel, gpu_of_layer: list[int]) -> PreTrainedModel:
    """Spread a model's layers by hooks of torch's alone, which cost little of Python's time."""
    inside: Any = model.model
    model.to("cuda:0")
    for layer, gpu in zip(inside.layers, gpu_of_layer, strict=True):
        _compute_on(layer.to(f"cuda:{gpu}"), torch.device("cuda", gpu))
    _compute_on(inside.norm, torch.device("cuda", 0))
    return model


def _compute_on(module: torch.nn.Module, where: torch.device) -> None:
    def moved(_module: Any, args: Any, kwargs: Any) -> Any:
        return _moved(args, where), {name: _moved(each, where) for name, each in kwargs.items()}

    module.register_forward_pre_hook(moved, with_kwargs=True)


def _moved(value: Any, where: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(each, where) for each in value)
    return value.to(where) if hasattr(value, "to") else value
