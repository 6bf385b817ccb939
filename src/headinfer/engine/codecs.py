"""The codec of a form of tokens in host memory."""

import functools
from collections.abc import Iterable

import torch

from headinfer.eight_bits import codec as eight_bits
from headinfer.errors import OptionError
from headinfer.packed import codec as packed
from headinfer.packed.codec import Codec
from headinfer.plan.format import Format


@functools.cache
def codec_of(form: Format, where: torch.device) -> Codec:
    """Return what packs and unpacks tokens that are not dense.

    Args:
        form: in which they lie in host memory.
        where: the device that packs them.

    Raises:
        OptionError: nothing does it there.
    """
    assert form is not Format.DENSE
    return packed.codec_for(where) if form.code is None else eight_bits.codec_for(form.code, where)


def check_codec(form: Format, where: torch.device, dtype: torch.dtype, dims: Iterable[int]) -> None:
    """See that a GPU packs and unpacks keys and values right.

    Triton compiles for the size of a head. So what is checked is what a model's tokens take, and no
    prompt waits for it again. Each process checks anew, as Triton may not compile in the next one.

    Args:
        form: in which they lie in host memory.
        where: the device that packs them.
        dtype: in which they are computed.
        dims: elements of a key and of a value.

    Raises:
        OptionError: nothing packs them there, or not as the reference does.
    """
    for dim in dims if where.type == "cuda" else ():
        _check(form, where, dtype, dim)


@functools.cache
def _check(form: Format, where: torch.device, dtype: torch.dtype, dim: int) -> None:
    codec = codec_of(form, where)
    if form.code is None:
        right = packed.is_exact(codec, where, dim)
    else:
        right = eight_bits.agrees(form.code, codec, where, dtype, dim)
    if not right:
        raise OptionError(
            f"kv_cache={form.value} fails its check on {where}: its pages or values differ from "
            "the reference's; use kv_cache=dense (--kv-cache dense)"
        )
