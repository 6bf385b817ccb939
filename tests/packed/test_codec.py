"""The choice of a codec: one that does not give every bit back is refused."""

import pytest
import torch

from headinfer.errors import OptionError
from headinfer.packed.codec import CpuCodec, checked, codec_for

CPU = torch.device("cpu")


class Forgetful(CpuCodec):
    """Forgets a bit."""

    def unpack(self, pages, values, first=0, counted=None):
        super().unpack(pages, values, first, counted)
        values[0, 0, 0, 0] = 0


class Padding(CpuCodec):
    """Writes other bytes than the reference."""

    def pack(self, values, pages):
        super().pack(values, pages)
        pages[..., -1] = 1


def test_a_codec_is_compared_with_the_reference() -> None:
    codec = codec_for(CPU)
    assert checked(codec, CPU) is codec_for(CPU) is codec
    for wrong in (Forgetful(), Padding()):
        with pytest.raises(OptionError, match=r"fails its check on cpu.*--kv-cache dense"):
            checked(wrong, CPU)
