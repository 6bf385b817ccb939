"""Which OpenMP library the compiled kernels share with torch."""

import ctypes
import shutil
from pathlib import Path

import pytest

from headinfer.attend.native import build


def test_torchs_openmp_is_found_beside_that_of_another_package(tmp_path: Path) -> None:
    alone = build._openmp_library()
    if alone is None:
        pytest.skip("torch does not run on GCC's OpenMP here")
    other = tmp_path / "libgomp-of-another-package.so.1"
    shutil.copy(alone, other)
    ctypes.CDLL(str(other))  # as importing scikit-learn does
    assert str(other) in Path("/proc/self/maps").read_text()
    assert build._openmp_library() == alone


@pytest.mark.parametrize("name", ["libm.so.6", "libnowhere.so"])
def test_another_openmp_than_gccs_is_not_used(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(build, "_TORCH_LIBRARY", Path(name))
    assert build._openmp_library() is None
