"""The codec of a form of tokens in host memory."""

import functools
from collections.abc import Callable

import torch

from headinfer.eight_bits import codec as eight_bits
from headinfer.errors import OptionError
from headinfer.packed import codec as packed
from headinfer.packed.codec import Codec
from headinfer.plan.format import Format


@functools.cache
def codec_of(form: Format, where: torch.device, dtype: torch.dtype) -> Codec:
    """Return what packs and unpacks tokens that are not dense, and was seen to do it right.

    The check also finds out whether Triton can compile here, so each process makes it.

    Args:
        form: in which they lie in host memory.
        where: the device that packs them.
        dtype: in which they are computed.

    Raises:
        OptionError: there is none that does it right.
    """
    assert form is not Format.DENSE
    check: Callable[[], bool]
    if form.code is None:
        codec = packed.codec_for(where)
        check = functools.partial(packed.is_exact, codec, where)
    else:
        codec = eight_bits.codec_for(form.code, where)
        check = functools.partial(eight_bits.agrees, form.code, codec, where, dtype)
    if where.type == "cuda" and not check():
        raise OptionError(
            f"kv_cache={form.value} fails its check on {where}: its pages or values differ from "
            "the reference's; use kv_cache=dense (--kv-cache dense)"
        )
    return codec
