"""Packing and unpacking in C: the reference's bytes, whatever the processor is thought to have."""

import platform
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headinfer.native import build
from headinfer.packed.layout import PageLayout
from headinfer.packed.native import pack_native, pages_library, unpack_native
from headinfer.packed.reference import pack
from packed_values import KINDS, bits_of, drawn, keep_raw

pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None or build._openmp_library() is None, reason="no compiled kernels"
)


@pytest.fixture(params=["", "-mno-avx512f", "-mno-avx512f -mno-avx2"], ids=["all", "avx2", "plain"])
def compiled(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[None]:
    """Kernels compiled anew, for a processor that may lack something."""
    if request.param and (platform.machine() != "x86_64" or shutil.which("gcc") is None):
        pytest.skip("no GCC for x86")
    if request.param:
        monkeypatch.setenv("CC", f"gcc {request.param}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pages_library.cache_clear()
    yield
    pages_library.cache_clear()


@pytest.mark.covering
@pytest.mark.parametrize("dim", [48, 128])
def test_pages_are_the_references_and_every_bit_comes_back(compiled: None, dim: int) -> None:
    library = pages_library(dim)
    assert library is not None
    for kind in KINDS:
        for tokens in (1, 64, 150):
            values = drawn(kind, (2, 2, tokens, dim), tokens)
            wanted = pack(values)
            pages = torch.full_like(wanted, 7)
            pack_native(library, values, pages)
            assert torch.equal(pages, wanted)
            kept = keep_raw(pages, values)
            back = torch.zeros_like(values)
            unpack_native(library, pages, back)
            assert torch.equal(bits_of(back), bits_of(values))
            del kept


def test_pages_are_written_and_read_where_they_lie() -> None:
    library = pages_library(48)
    assert library is not None
    values = drawn("special", (2, 100, 3, 48)).transpose(1, 2)
    memory = torch.full((2, 5, 7, PageLayout(48).page_bytes), 7, dtype=torch.uint8)
    cut = memory[:, 1:4, 2:4]
    pack_native(library, values, cut)
    assert torch.equal(cut, pack(values))
    assert (memory[:, 0] == 7).all()
    assert (memory[:, 1:4, :2] == 7).all()
    target = torch.zeros(2, 3, 100, 80, dtype=torch.bfloat16)
    unpack_native(library, cut, target[..., :48])
    assert torch.equal(bits_of(target[..., :48]), bits_of(values))
    assert not target[..., 48:].any()


@pytest.mark.skipif(platform.system() != "Linux", reason="no list of threads")
def test_a_fresh_thread_packs_with_as_many_threads_as_torch_is_set_to() -> None:
    library, counts = pages_library(48), []
    assert library is not None
    values = drawn("normal", (1, 2, 64 * 64, 48), 1)
    pages = pack(values)

    def work() -> None:
        for _ in range(2):
            counts.append(len(list(Path("/proc/self/task").iterdir())))
            pack_native(library, values, pages)
            unpack_native(library, pages, values)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert counts[0] == counts[1]
