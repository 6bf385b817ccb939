"""Where a model computes: on one device, or spread over several by accelerate.

Accelerate's hooks move hidden states from device to device. They also bring weights to a device
that lie in CPU memory or on disk, module by module, and take them away again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from headinfer.errors import UnsupportedModelError
from headinfer.integration.accelerate_hooks import accelerate_hooks, device_of
from headinfer.integration.stored_weights import bytes_by_device
from headinfer.integration.support import (
    attention_modules,
    layer_index,
    layer_kind,
    stock_cache,
)
from headinfer.plan.shape import LayerKind

_META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Placement:
    """A placement of a model's layers and weights.

    Attributes:
        layers: where each layer that attends computes.
        weights_bytes: on each device, with the most that is brought there at a time.
        brought_bytes: what is brought to devices each time that the model is called, in all.
    """

    layers: tuple[torch.device, ...]
    weights_bytes: dict[torch.device, int]
    brought_bytes: dict[torch.device, int]

    @property
    def obstacle(self) -> str | None:
        """What keeps a step from being captured, as hooks that Python must call; or None."""
        if self.brought_bytes:
            return "accelerate brings some of its weights to where they are used"
        if not self.weights_bytes.keys() <= set(self.layers):
            return "some of its weights are on a device that has no layer"
        return None


def placement_of(model: PreTrainedModel) -> Placement:
    """Return the placement of a model whose kind is served.

    Raises:
        UnsupportedModelError: it computes elsewhere than on the CPU or on CUDA, or on both, or one
            layer's attention is spread.
    """
    name = type(model).__name__
    used = list(_used_tensors(model, None))
    devices = {where for _tensor, where in used}
    kinds = {device.type for device in devices}
    if len(kinds) != 1 or not kinds <= {"cpu", "cuda"}:
        places = ", ".join(sorted(map(str, devices))) or "no parameters"
        raise UnsupportedModelError(
            f"{name} must lie on the CPU or on CUDA devices, not on: {places}"
        )
    stored = bytes_by_device(model)
    stored.pop(_META, None)
    brought = _brought_bytes(model)
    weights = {device: stored.get(device, 0) + max(brought.get(device, (0,))) for device in devices}
    if len(devices) == 1:  # a buffer that was left elsewhere is as if it were there
        weights = dict.fromkeys(devices, sum(stored.values()) + sum(map(max, brought.values())))
    return Placement(
        layers=tuple(_layer_devices(model, name)),
        weights_bytes=weights,
        brought_bytes={device: sum(sizes) for device, sizes in brought.items()},
    )


def _layer_devices(model: PreTrainedModel, name: str) -> Iterator[torch.device]:
    """Yield the device of each layer that attends, in the order of the layers."""
    modules = {layer_index(module): module for module in attention_modules(model)}
    above = _bringers_above(model)
    for layer_idx, layer in enumerate(stock_cache(model).layers):
        if layer_kind(layer) is LayerKind.STATE:
            continue
        module = modules[layer_idx]
        devices = {where for _tensor, where in _used_tensors(module, above.get(module))}
        if len(devices) != 1:
            places = ", ".join(sorted(map(str, devices)))
            raise UnsupportedModelError(
                f"the attention of layer {layer_idx} of {name} must lie on one device, not on: "
                f"{places}; keep its layers whole in the device_map"
            )
        yield devices.pop()


def _used_tensors(
    module: torch.nn.Module, bringer: torch.device | None
) -> Iterator[tuple[torch.Tensor, torch.device]]:
    """Yield a module's parameters, and where they are when they are used.

    Args:
        module: with all that is in it.
        bringer: where a hook of a module around it brings all of them; None where none does.
    """
    own, all_inside = _brings_to(module)
    here = own or bringer
    for parameter in module.parameters(recurse=False):
        yield parameter, here if here is not None and parameter.is_meta else parameter.device
    for child in module.children():
        yield from _used_tensors(child, own if all_inside else bringer)


def _bringers_above(model: torch.nn.Module) -> dict[torch.nn.Module, torch.device]:
    """Return where hooks bring all parameters of a module that is inside theirs."""
    above: dict[torch.nn.Module, torch.device] = {}
    for module in model.modules():
        where, all_inside = _brings_to(module)
        if where is not None and all_inside:
            above.update(dict.fromkeys(module.modules(), where))
    return above


def _brought_bytes(model: torch.nn.Module) -> dict[torch.device, list[int]]:
    """Return the bytes that hooks bring to each device, one time after the other."""
    brought: dict[torch.device, list[int]] = {}
    for module in model.modules():
        where, all_inside = _brings_to(module)
        if where is not None:
            parts = [each for each in module.parameters(recurse=all_inside) if each.is_meta]
            if parts:
                brought.setdefault(where, []).append(sum(part.nbytes for part in parts))
    return brought


def _brings_to(module: torch.nn.Module) -> tuple[torch.device | None, bool]:
    """Return where a module's hook brings its weights, if it does, and whether all inside it."""
    for hook in accelerate_hooks(module):
        device = device_of(hook) if getattr(hook, "offload", False) else None
        if device is not None:
            return device, bool(hook.place_submodules)
    return None, False
