"""A check of kernels that passed is not made again, and one that failed is."""

from pathlib import Path

import pytest
import torch

from headinfer.attend import verdict
from headinfer.attend.check import agrees
from headinfer.attend.reference import ReferenceKernel
from headinfer.attend.table import Kernels
from headinfer.attend.verdict import agrees_here, kept


class Check:
    """A check that counts how often it is made."""

    def __init__(self, passes: bool = True) -> None:
        self.passes, self.times = passes, 0

    def __call__(self) -> bool:
        self.times += 1
        return self.passes


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("cache_home")
def test_a_check_that_passed_is_not_made_again() -> None:
    check = Check()
    assert [kept(("a kernel", 128), check) for _ in range(3)] == [True] * 3
    assert check.times == 1


@pytest.mark.usefixtures("cache_home")
def test_a_check_that_failed_is_made_again() -> None:
    check = Check(passes=False)
    assert not kept(("a kernel", 128), check)
    check.passes = True
    assert kept(("a kernel", 128), check)
    assert check.times == 2


@pytest.mark.usefixtures("cache_home")
def test_what_it_depends_on_tells_checks_apart() -> None:
    check = Check()
    for about in (("a kernel", 128), ("a kernel", 64), ("another", 128), ("a kernel", 128, None)):
        assert kept(about, check)
    assert check.times == 4


def test_where_nothing_can_be_kept_each_process_checks(cache_home: Path) -> None:
    check = Check()
    (cache_home / "headinfer").write_text("a file where the folder would be")
    assert kept(("a kernel", 128), check)
    assert kept(("a kernel", 128), check)
    assert check.times == 2


def test_only_checks_on_a_gpu_are_kept(cache_home: Path) -> None:
    device = torch.device("cpu")
    assert agrees_here(Kernels([ReferenceKernel()]), device, torch.float32, 16)
    assert not list(cache_home.iterdir())


@pytest.mark.gpu
def test_kernels_of_a_gpu_are_checked_once(
    cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Kernels] = []

    def counted(kernels: Kernels, *arguments: object) -> bool:
        made.append(kernels)
        return agrees(kernels, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(verdict, "agrees", counted)
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in (torch.float32, torch.float32, torch.float64):
        assert agrees_here(Kernels([ReferenceKernel()]), device, dtype, 16)
    assert len(made) == 2
    assert len(list((cache_home / "headinfer" / "kernels").iterdir())) == 2
