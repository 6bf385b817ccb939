"""A codec that is wrong on a GPU is refused."""

from collections.abc import Iterator

import pytest
import torch

from headinfer.eight_bits.codec import CpuEightBits
from headinfer.engine import codecs
from headinfer.errors import OptionError
from headinfer.packed.codec import CpuCodec
from headinfer.plan.format import Format

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _no_codec_of_before() -> Iterator[None]:
    for each in codecs.codec_of, codecs._check:
        each.cache_clear()
    yield
    for each in codecs.codec_of, codecs._check:
        each.cache_clear()


@pytest.mark.parametrize("form", [Format.PACKED, Format.INT8])
def test_a_codec_that_fails_its_check_is_refused(
    form: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codecs.packed, "codec_for", lambda _where: CpuCodec())
    monkeypatch.setattr(codecs.eight_bits, "codec_for", lambda code, _where: CpuEightBits(code))
    monkeypatch.setattr(codecs.packed, "is_exact", lambda *given: given[-1] == 64)
    monkeypatch.setattr(codecs.eight_bits, "agrees", lambda *given: given[-1] == 64)
    codecs.check_codec(form, GPU, torch.bfloat16, (64,))
    with pytest.raises(OptionError, match=rf"kv_cache={form.value} fails.*--kv-cache dense"):
        codecs.check_codec(form, GPU, torch.bfloat16, (64, 128))  # which Triton compiles anew


@pytest.mark.gpu
@pytest.mark.parametrize("form", [Format.PACKED, Format.INT8])
@pytest.mark.parametrize("dim", [16, 80, 128, 192, 256])
def test_codecs_of_a_gpu_pass_their_check(form: Format, dim: int) -> None:
    codecs.check_codec(form, GPU, torch.bfloat16, (dim,))
