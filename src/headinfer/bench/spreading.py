"""Models that lie on several GPUs, by their layers or heads; random weights are made there."""

import sys
from typing import Any
from zlib import crc32

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from headinfer.bench.catalogue import Spread
from headinfer.bench.spec import TrialSpec
from headinfer.errors import UnsupportedModelError
from headinfer.integration.even_map import DeviceMap, spread_evenly
from headinfer.plan.even_layers import even_layers


def devices_of_layers(layers: int, gpus: int) -> list[int]:
    """Return the GPU of each layer: as many on each as can be, more on the first ones.

    Args:
        layers: of the model.
        gpus: that they are spread over.
    """
    counts = even_layers([0] * layers, 0, 0, [0] * gpus)
    assert counts is not None, "a run has at most as many GPUs as layers"
    return [gpu for gpu, count in enumerate(counts) for _ in range(count)]


def placing(spec: TrialSpec, config: Any, device: torch.device) -> dict[str, Any]:
    """Return keywords for `from_pretrained` that place a trial's model as its spread says.

    Args:
        spec: the trial.
        config: of the model.
        device: where this process computes, or the first of its GPUs.

    Raises:
        UnsupportedModelError: the layers of such a model are not known by name.
    """
    if spec.spread is Spread.HEADS:
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    if spec.spread is Spread.ONE or device.type != "cuda":
        return {"device_map": {"": device}}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {"device_map": _device_map(model, spec.gpus)}


def _device_map(model: PreTrainedModel, gpus: int) -> DeviceMap:
    """Return a GPU for each module: layers in equal numbers, what is after them on the last."""
    places = spread_evenly(model, [sys.maxsize] * gpus)
    if places is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of layers to spread; leave out methods of "
            "several GPUs"
        )
    return places


def random_model(
    spec: TrialSpec, config: Any, device: torch.device, attention: str
) -> PreTrainedModel:
    """Return a model of random weights that are the same however it is spread.

    transformers loads it as a checkpoint of which every weight is missing. So each weight is made
    on its GPU, and none in CPU memory.

    Args:
        spec: the trial.
        config: of the model.
        device: where this process computes, or the first of its GPUs.
        attention: of transformers.
    """
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    model: PreTrainedModel = kind.from_pretrained(
        None,
        config=config,
        state_dict={},
        dtype=getattr(torch, spec.dtype),
        attn_implementation=attention,
        **placing(spec, config, device),
    )
    _draw_weights(model, config.get_text_config(decoder=True).initializer_range, spec.seed)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of what was drawn before it was split
    return model.eval()


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, deviation: float, seed: int) -> None:
    """Draw matrices by their names; norms and biases are as transformers begins with them."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        generator = torch.Generator(local.device).manual_seed(seed + crc32(name.encode()))
        whole = torch.empty(weight.shape, dtype=weight.dtype, device=local.device)
        whole.normal_(0.0, deviation, generator=generator)
        if isinstance(weight, DTensor):
            mesh, places = weight.device_mesh, weight.placements
            whole = distribute_tensor(whole, mesh, places, src_data_rank=None).to_local()
        local.copy_(whole)
