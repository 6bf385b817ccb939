"""The choice of a codec: one that does not give every bit back is found."""

import torch

from headinfer.packed.codec import CpuCodec, codec_for, is_exact

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
    for dim in (48, 128):
        assert is_exact(codec_for(CPU), CPU, dim)
        for wrong in (Forgetful(), Padding()):
            assert not is_exact(wrong, CPU, dim)
