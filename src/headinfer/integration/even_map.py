"""A `device_map` with about as many layers on each GPU, for a model that is still to be loaded.

transformers builds the model without memory, as it does itself before it loads one. It tells what
each weight will take, quantised ones as they will be stored.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer

from headinfer.plan.even_layers import even_layers

_UNPACKED = "compressed-tensors"
"""The method whose weights are unpacked when a model is first called, and stay so."""

DeviceMap = dict[str, int]
"""A GPU for each module, by its name; what is within goes with it."""


def even_map(
    config: Any,
    dtype: str,
    quantization: Any,
    limits: Sequence[int],
    *,
    trust_remote_code: bool = False,
) -> DeviceMap | None:
    """Return where each module of a model goes: layers in even numbers, as far as memory allows.

    Args:
        config: transformers' own; not changed.
        dtype: "auto" or a torch dtype's name.
        quantization: a config by which weights are quantised as they are loaded; None for none.
        limits: the most bytes of weights on each GPU.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        A map for `from_pretrained`. None where the GPUs do not hold all weights, or where the
        model's layers are in no list.
    """
    config = copy.deepcopy(config)
    named = config.get_text_config(decoder=True).dtype or config.dtype
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config,
            dtype=named if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
        )
        quantizer = _quantizer(config, quantization)
        if quantizer is not None:
            quantizer.preprocess_model(
                model=model, dtype=model.dtype, device_map=None, checkpoint_files=None
            )
            limits = list(quantizer.adjust_max_memory(dict(enumerate(limits))).values())
    return spread_evenly(model, limits, quantizer)


def spread_evenly(
    model: PreTrainedModel, limits: Sequence[int], quantizer: Any = None
) -> DeviceMap | None:
    """Return where each module of a model goes; see `even_map`.

    What has weights and stands behind the layers is on the last GPU, so that a chunk of a prompt is
    done with the others. An output matrix tied to the embedding goes with that, on the first GPU.

    Args:
        model: its modules and its tensors' sizes are looked at.
        limits: the most bytes of weights on each GPU.
        quantizer: transformers' own; None where weights are not quantised.
    """
    layers = _list_of_layers(model)
    if layers is None:
        return None
    sizes = _sizes(model, quantizer)
    weights = [name for name, _ in model.named_parameters() if name in sizes]
    parts = list(_parts(model, layers))
    first = parts.index(f"{layers}.0")
    own = [part for part in parts if _is_in(part, layers)]
    after = [
        part
        for part in parts[first:]
        if part not in own and any(_is_in(name, part) for name in weights)
    ]
    before = [part for part in parts if part not in own and part not in after]
    counts = even_layers(
        [_bytes_of([layer], sizes) for layer in own],
        _bytes_of(before, sizes),
        _bytes_of(after, sizes),
        limits,
    )
    if counts is None:
        return None
    gpus = [gpu for gpu, count in enumerate(counts) for _ in range(count)]
    places = dict.fromkeys(before, 0) | dict(zip(own, gpus, strict=True))
    return places | dict.fromkeys(after, len(limits) - 1)


def _quantizer(config: Any, quantization: Any) -> Any:
    """Return transformers' own for a model; None where its weights do not stay quantised."""
    stored = getattr(config, "quantization_config", None)
    if stored is None and quantization is None:
        return None
    quantizer: Any = AutoHfQuantizer.from_config(
        quantization if stored is None else stored, pre_quantized=stored is not None
    )
    quantizer.validate_environment(device_map="auto", weights_only=True)
    return None if quantizer.quantization_config.quant_method == _UNPACKED else quantizer


def _sizes(model: PreTrainedModel, quantizer: Any) -> dict[str, int]:
    """Return the bytes that each tensor will take; tied ones are left out."""
    tied = getattr(model, "all_tied_weights_keys", {})
    sizes = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        each = tensor.itemsize
        if quantizer is not None:
            each = quantizer.param_element_size(model, name, tensor)
        if name not in tied:
            sizes[name] = int(tensor.numel() * each)
    return sizes


def _list_of_layers(model: PreTrainedModel) -> str | None:
    """Return the name of the list that has the layers of the text model."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    inside = set(decoder.modules())
    return next(
        (
            name
            for name, module in model.named_modules()
            if module in inside and isinstance(module, torch.nn.ModuleList)
            if len(module) == count
        ),
        None,
    )


def _parts(module: torch.nn.Module, layers: str, name: str = "") -> Iterator[str]:
    """Yield the names of layers and of what stands beside them and around, in the model's order."""
    inside = f"{name}." if name else ""
    for own, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield inside + own
    for own, child in module.named_children():
        if f"{layers}.".startswith(f"{inside}{own}."):
            yield from _parts(child, layers, inside + own)
        else:
            yield inside + own


def _is_in(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}.")


def _bytes_of(parts: Sequence[str], sizes: Mapping[str, int]) -> int:
    return sum(size for name, size in sizes.items() if any(_is_in(name, part) for part in parts))
