import gc
import importlib.util
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from covering import thin
from interpreted import patched_once

if not torch.cuda.is_available():
    # Triton's programs then run in its interpreter, which must be known when it is first imported,
    # as transformers may do.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and leave many cases to runs of what is slow."""
    thin(items)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules and tests, which it would look through often."""
    gc.collect()
    gc.freeze()


def copy_kernels(source: Path, target: Path) -> None:
    """Copy what is missing, each by a name of its own first: other processes may do so too."""
    for file in source.glob("*.so"):
        if not (target / file.name).exists():
            part = target / f"{file.name}.{os.getpid()}"
            shutil.copy(file, part)
            part.replace(target / file.name)


@pytest.fixture(autouse=True, scope="session")
def _own_folders(tmp_path_factory, request) -> Iterator[None]:
    """Neither read nor change what the developer's own runs keep, in processes started here too.

    Processes of one run share what they build: kernels in C are compiled once, not by each. The
    next run has them too, as their names tell what they were compiled from.
    """
    base = tmp_path_factory.getbasetemp()
    built = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built"
    native = built / "headinfer" / "native"
    for folder in (built, native.parent, native):
        folder.mkdir(mode=0o700, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(built)
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    if not hasattr(request.config, "cache"):  # pytest was told to keep nothing
        yield
        return
    kept = request.config.cache.mkdir("native")
    copy_kernels(kept, native)
    yield
    copy_kernels(native, kept)


@pytest.fixture(autouse=True, scope="session")
def _no_terminal() -> None:
    """Print as wide as where nobody says how wide, also in processes of pytest-xdist."""
    os.environ.pop("COLUMNS", None)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models are fastest, and results repeatable, on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def patch_once() -> Iterator[None]:
    """Spare Triton's interpreter a third of its time, where there is no GPU."""
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        yield
        return
    with patched_once():
        yield


@pytest.fixture(autouse=True)
def _small_numbers() -> Iterator[None]:
    """Have numbers below 2**-126 again: a command that ran in this process turns them off."""
    yield
    torch.set_flush_denormal(False)


def pytest_configure() -> None:
    """Hear signals that whoever started the tests ignores, as a shell does for its background."""
    heard = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if hasattr(signal, "SIGHUP"):
        heard[signal.SIGHUP] = signal.SIG_DFL
    for number, handler in heard.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
