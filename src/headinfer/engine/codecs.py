"""The codec of a form of tokens in host memory."""

import torch

from headinfer.eight_bits.codec import eight_bits_for
from headinfer.packed.codec import Codec, codec_for
from headinfer.plan.format import Format


def codec_of(form: Format, where: torch.device, dtype: torch.dtype) -> Codec:
    """Return what packs and unpacks tokens that are not dense.

    Args:
        form: in which they lie in host memory.
        where: the device that packs them.
        dtype: in which they are computed.

    Raises:
        OptionError: there is none that does it right.
    """
    assert form is not Format.DENSE
    return codec_for(where) if form.code is None else eight_bits_for(form.code, where, dtype)
