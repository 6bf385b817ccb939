"""The form in which a model's tokens lie in host memory: as they are computed, or in pages."""

import dataclasses
import functools
import logging
from collections.abc import Sequence

import torch

from headinfer.device.base import Device
from headinfer.engine.codecs import check_codec
from headinfer.engine.raw_pages import addressed
from headinfer.errors import MemoryPlanError
from headinfer.plan.format import Format
from headinfer.plan.options import Options
from headinfer.plan.shape import ModelShape

_logger = logging.getLogger(__name__)

_ADDRESSED_BYTES = 4096
"""Bytes of host memory whose address on a device is looked at."""


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
        check_codec(form, device.torch_device, dtype, stored.packed_dims)
        return stored
    _logger.warning("kv_cache=%s has no effect %s", form.value, reason)
    return shape


def with_open_form(
    shape: ModelShape, options: Options, devices: Sequence[Device], dtype: torch.dtype, ranks: int
) -> Options:
    """Return options that leave the form to each cache's plan, only where tokens can be packed.

    Otherwise they are dense. Packed tokens above a disk, on several devices or in several ranks
    must be asked for: they were not timed there.

    Args:
        shape: of the model, dense.
        options: what the user set.
        devices: of each layer that attends.
        dtype: of keys and values, mostly.
        ranks: that compute the model.
    """
    timed = len(set(devices)) == ranks == 1 and options.disk_cache is None
    can = devices[0].packs_fast and dtype is torch.bfloat16 and shape.packed.packs
    if options.kv_cache != "auto" or (timed and can):
        return options
    return dataclasses.replace(options, kv_cache="dense")


def packing_works(device: Device, shape: ModelShape) -> bool:
    """Whether tokens are packed on a device as they are to be; the log has what fails.

    It is asked when a plan has packed tokens that nobody asked for, which takes a compiler.

    Args:
        device: which.
        shape: of the model, with packed tokens.
    """
    try:
        addressed(device, device.host_empty(_ADDRESSED_BYTES))
        return _is_checked(device.torch_device, shape.packed_dims)
    except (MemoryPlanError, torch.OutOfMemoryError) as error:  # the next time may be another
        _logger.info("the KV cache is dense: %s", error)
        return False


@functools.cache
def _is_checked(where: torch.device, dims: tuple[int, ...]) -> bool:
    try:
        check_codec(Format.PACKED, where, torch.bfloat16, dims)
    except torch.OutOfMemoryError:
        raise  # an answer would last
    except Exception as error:  # a compiler's own kinds among them
        _logger.info("the KV cache is dense: %s", error)
        return False
    return True


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
