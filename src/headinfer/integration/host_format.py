"""The form in which a model's tokens lie in host memory: as they are computed, or in pages."""

import dataclasses
import logging

import torch

from headinfer.device.base import Device
from headinfer.engine.codecs import codec_of
from headinfer.plan.format import Format
from headinfer.plan.options import Options
from headinfer.plan.shape import ModelShape

_logger = logging.getLogger(__name__)


def with_host_format(
    shape: ModelShape, options: Options, device: Device, dtype: torch.dtype
) -> ModelShape:
    """Return a model's shape with the form that the user wants in host memory.

    Where tokens cannot have it that is said in the log, and they are dense.

    Args:
        shape: of the model.
        options: what the user set.
        device: where attention is computed.
        dtype: of keys and values, mostly.

    Raises:
        OptionError: nothing packs them on the device.
    """
    form = Format.DENSE if options.kv_cache == "auto" else Format(options.kv_cache)
    if form is Format.DENSE:
        return shape
    stored = shape.stored_as(form)
    if device.tiles_are_views:
        reason = "on the CPU, which attends the KV cache where it lies"
    elif not shape.full_layers:
        reason = "on this model: no layer keeps tokens in CPU memory"
    elif form is Format.PACKED and dtype is not torch.bfloat16:
        reason = f"on {str(dtype).removeprefix('torch.')}: only bfloat16 can be packed"
    elif not stored.packs:
        reason = "on this model: no layer has keys and values of a multiple of 16 elements"
    else:
        codec_of(form, device.torch_device, dtype)
        return stored
    _logger.warning("kv_cache=%s has no effect %s", form.value, reason)
    return shape


def with_kv_dtype(shape: ModelShape, dtype: torch.dtype) -> ModelShape:
    """Return a model's shape with keys and values of a dtype, packed where that can be."""
    if dtype is not torch.bfloat16 and shape.host_format is Format.PACKED:
        shape = shape.dense
    computed = shape.kv_itemsize
    if dtype.itemsize == computed:
        return shape
    return dataclasses.replace(
        shape, kv_itemsize=dtype.itemsize, computed_itemsize=max(computed, dtype.itemsize)
    )
