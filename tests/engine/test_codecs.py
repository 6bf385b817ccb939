"""A codec that is wrong on a GPU is refused; one that was right there is not checked again."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from headinfer.eight_bits.codec import CpuEightBits
from headinfer.engine import codecs
from headinfer.errors import OptionError
from headinfer.packed.codec import CpuCodec
from headinfer.plan.format import Format

GPU = torch.device("cuda", 0)
FORMS = Format.PACKED, Format.INT8


@pytest.fixture(autouse=True)
def _no_codec_of_before() -> Iterator[None]:
    codecs.codec_of.cache_clear()
    yield
    codecs.codec_of.cache_clear()


@pytest.mark.parametrize("form", FORMS)
def test_a_codec_that_fails_its_check_is_refused(
    form: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def fails(about: tuple[object, ...], _where: torch.device, _check: Callable[[], bool]) -> bool:
        asked.append(about)
        return False

    monkeypatch.setattr(codecs.packed, "codec_for", lambda _where: CpuCodec())
    monkeypatch.setattr(codecs.eight_bits, "codec_for", lambda code, _where: CpuEightBits(code))
    monkeypatch.setattr(codecs, "kept_here", fails)
    with pytest.raises(OptionError, match=rf"kv_cache={form.value} fails.*--kv-cache dense"):
        codecs.codec_of(form, GPU, torch.bfloat16)
    assert asked == [("codec", form.value, "torch.bfloat16")]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_codecs_of_a_gpu_are_checked_once(
    form: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "headinfer" / "kernels"
    codecs.codec_of(form, GPU, torch.bfloat16)
    assert len(list(kept.iterdir())) == 1
    codecs.codec_of.cache_clear()
    for module, name in ((codecs.packed, "is_exact"), (codecs.eight_bits, "agrees")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("it was checked anew"))
    codecs.codec_of(form, GPU, torch.bfloat16)
