"""Compiled kernels: kept where nobody else can change them, looked at before they are loaded."""

import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from headinfer import folders
from headinfer.native import build

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as others")
OTHER = 12345
"""The id of another user."""

PLANTED = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void mark(void) { fclose(fopen(MARK, "w")); }
void attend_heads(void) {}
"""


FAST_COMPILER = """#!/bin/sh
case " $* " in
*" -shared "*) cp {compiled} kernel.so ;;
*) : > kernel.o ;;
esac
"""
"""Gives what was compiled before, for compiling takes a second."""


@pytest.fixture(scope="session")
def fast_compiler(tmp_path_factory) -> Path:
    if build._openmp_library() is None or shutil.which("cc") is None:
        pytest.skip("no kernel can be compiled here")
    folder = tmp_path_factory.mktemp("compiler")
    compiler, source = folder / "cc", folder / "kernel.c"
    source.write_text("void attend_heads(void) {}")
    compiler.write_text(FAST_COMPILER.format(compiled=folder / "kernel.so"))
    compiler.chmod(0o755)
    command = ["cc", "-shared", "-fPIC", "-o", str(folder / "kernel.so"), str(source)]
    subprocess.run(command, check=True)
    return compiler


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path, fast_compiler) -> Path:
    """An empty cache folder, and a process that has said nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", str(fast_compiler))
    monkeypatch.setattr(build, "_missing", [])
    folders._temporary_folder.cache_clear()
    build._say_not_kept.cache_clear()
    return tmp_path / "cache"


def compiled(rows: int = 1) -> ctypes.CDLL | None:
    library = build.compile_kernel(
        "headinfer.attend.native", "decode.c", torch.float32, HEAD_DIM=16, ROWS=rows
    )
    assert library is None or library.attend_heads
    return library


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "headinfer" / "native").iterdir())


def test_what_is_kept_is_closed_to_others_and_loaded_again(cache, caplog, monkeypatch):
    monkeypatch.delenv("CC")
    before = os.umask(0)
    try:
        assert compiled()
    finally:
        os.umask(before)
    (path,) = kept(cache)
    assert path.stat().st_mode & 0o7777 == 0o600
    assert [folder.stat().st_mode & 0o7777 for folder in list(path.parents)[:3]] == [0o700] * 3
    monkeypatch.setattr(build.subprocess, "run", None)  # nothing is compiled
    assert compiled()
    assert caplog.records == []


COMPILE = """
import torch
from headinfer.native import build
package = "headinfer.attend.native"
assert build.compile_kernel(package, "decode.c", torch.float32, HEAD_DIM=16, ROWS=1).attend_heads
"""


def python(code: str, **environment: str) -> "subprocess.Popen[bytes]":
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=variables,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a process group to signal to
    )


def test_a_truncated_kernel_is_compiled_anew(cache):
    assert compiled()
    (path,) = kept(cache)
    whole = path.read_bytes()
    damaged = cache / "damaged"  # the loaded one must stay as it is
    damaged.write_bytes(whole[: len(whole) // 2])
    damaged.chmod(0o600)
    damaged.replace(path)
    process = python(COMPILE)
    said = process.communicate()[1].decode()
    assert process.returncode == 0, said
    (line,) = said.splitlines()
    assert str(path) in line
    assert "compiled anew" in line
    assert path.stat().st_size == len(whole)


@pytest.mark.parametrize("damage", ["no ELF", "one byte", "another's", "link"])
def test_a_damaged_kernel_is_compiled_anew_and_said_once(cache, caplog, tmp_path, damage):
    assert compiled(rows=2)
    (other,) = kept(cache)
    assert compiled()
    (path,) = set(kept(cache)) - {other}
    whole = path.read_bytes()
    path.unlink()
    if damage == "link":
        (tmp_path / "kernel").write_bytes(whole)
        path.symlink_to(tmp_path / "kernel")
    else:
        middle = len(whole) // 2
        changed = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        content = {"no ELF": b"\0" * 9999, "one byte": changed}
        path.write_bytes(content.get(damage, other.read_bytes()))
        path.chmod(0o600)
    assert compiled()
    assert path.is_file()
    assert not path.is_symlink()
    assert path.stat().st_size == len(whole)
    assert compiled()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(path) in record.getMessage()


@as_root
@pytest.mark.parametrize("how", ["owner", "mode"])
def test_a_kernel_that_others_can_have_written_is_compiled_anew(cache, caplog, how):
    assert compiled()
    (path,) = kept(cache)
    if how == "owner":
        os.chown(path, OTHER, OTHER)
    else:
        path.chmod(0o666)
    assert compiled()
    assert "it belongs to another user" in caplog.text or "can write to it" in caplog.text
    assert (path.stat().st_uid, path.stat().st_mode & 0o7777) == (os.geteuid(), 0o600)


def plant(path: Path, mark: Path) -> None:
    """Put a library in a kernel's place that shows when it is loaded."""
    source = mark.with_suffix(".c")
    source.write_text(PLANTED)
    path.unlink()
    command = ["cc", "-shared", "-fPIC", f'-DMARK="{mark}"', "-o", str(path), str(source)]
    subprocess.run(command, check=True)


def test_nothing_is_loaded_from_a_folder_that_all_can_write_to(cache, caplog, tmp_path):
    assert compiled()
    (path,) = kept(cache)
    plant(path, tmp_path / "mark")
    cache.chmod(0o777)
    assert compiled()
    assert compiled(rows=2)
    assert not (tmp_path / "mark").exists()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for words in (str(cache), "can be written to by other users", "each process compiles its own"):
        assert words in record.getMessage()
    assert kept(cache) == [path]


def test_a_relative_cache_folder_is_not_the_current_one(monkeypatch, tmp_path, caplog):
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert compiled()
    assert list(here.iterdir()) == []
    assert len(kept(home / ".cache")) == 1
    assert caplog.records == []


def unknown(uid: int) -> None:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


@pytest.mark.parametrize("home", [None, ""])
def test_without_a_home_kernels_are_those_of_the_process(monkeypatch, caplog, home):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert compiled()
    assert compiled(rows=2)
    (record,) = caplog.records
    assert "no home folder" in record.getMessage()


@pytest.mark.parametrize("reason", ["no compiler", "not found", "fails", "no folder"])
def test_without_kernels_it_is_said_once_and_what_it_costs(
    monkeypatch, caplog, tmp_path, cache, reason
):
    if reason == "no compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("CC", " ")
    elif reason == "not found":
        monkeypatch.setenv("CC", "no-such-compiler -O1")
    elif reason == "fails":
        monkeypatch.setenv("CC", "cc -include no-such-file.h")
    else:

        def fail(*_arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(build.Path, "write_bytes", fail)
    assert compiled() is None
    assert compiled(rows=2) is None
    record = [record for record in caplog.records if record.levelname == "WARNING"][-1]
    words = {
        "no compiler": "install gcc, or name one in CC",
        "not found": "No such file",
        "fails": "no-such-file.h",
        "no folder": "No space left on device",
    }
    assert words[reason] in record.getMessage()
    assert "about half the speed" in record.getMessage()
    assert caplog.text.count("about half the speed") == 1
    assert not cache.exists() or kept(cache) == []


SLOW_COMPILER = """#!/bin/sh
touch {folder}/started
exec sleep 60 2> /dev/null
"""


def wait_for(path: Path) -> None:
    deadline_s = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline_s, f"{path} does not come"
        time.sleep(0.05)


def test_what_a_killed_compilation_left_is_removed(cache, tmp_path):
    slow = tmp_path / "slow-cc"
    slow.write_text(SLOW_COMPILER.format(folder=tmp_path))
    slow.chmod(0o755)
    process = python(COMPILE, CC=str(slow))
    wait_for(tmp_path / "started")
    assert compiled(rows=2)
    folders._clear.cache_clear()  # as another process begins
    assert compiled(rows=3)
    (running,) = (path for path in kept(cache) if path.suffix != ".so")
    process.kill()
    process.communicate()
    assert running.is_dir()
    folders._clear.cache_clear()
    assert compiled(rows=4)
    assert all(path.suffix == ".so" for path in kept(cache))


INTERRUPTED_COMPILER = """#!/bin/sh
touch {folder}/started
while ! test -e {folder}/interrupted; do sleep 0.05; done
exec {compiler} "$@"
"""

COMPILE_ON = """
import signal
signal.signal(signal.SIGINT, lambda *_arguments: None)
"""


@pytest.mark.slow
def test_ctrl_c_is_not_for_the_compiler(tmp_path, fast_compiler):
    patient = tmp_path / "patient-cc"
    patient.write_text(INTERRUPTED_COMPILER.format(folder=tmp_path, compiler=fast_compiler))
    patient.chmod(0o755)
    process = python(COMPILE_ON + COMPILE, CC=str(patient))
    wait_for(tmp_path / "started")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    (tmp_path / "interrupted").touch()
    said = process.communicate()[1]
    assert (process.returncode, said) == (0, b"")


READ_ONLY = """
import os, sys, torch
from headinfer.native import build
package = "headinfer.attend.native"
build._headers(package)  # imports what another user may not be able to
os.seteuid(12345)
assert build.compile_kernel(package, "decode.c", torch.float32, HEAD_DIM=16, ROWS=1)
print("the first", file=sys.stderr)
assert build.compile_kernel(package, "decode.c", torch.float32, HEAD_DIM=16, ROWS=2)
os.seteuid(0)
"""


@pytest.mark.slow
@as_root
def test_a_read_only_folder_serves_what_is_in_it(monkeypatch):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        base = Path(name)
        monkeypatch.setenv("XDG_CACHE_HOME", name)
        monkeypatch.delenv("CC")
        assert compiled()
        (path,) = kept(base)
        for folder in (base, path.parent.parent, path.parent):
            folder.chmod(0o755)
        path.chmod(0o644)
        process = python(READ_ONLY)
        said = process.communicate()[1].decode().splitlines()
        assert process.returncode == 0, said
        assert said[0] == "the first"
        (line,) = said[1:]
        assert "Permission denied" in line
        assert "each process compiles its own" in line
        assert kept(base) == [path]


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
def test_another_openmp_than_gccs_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setattr(build, "_TORCH_LIBRARY", Path(name))
    assert build._openmp_library() is None
    assert compiled() is None
    assert "GCC's OpenMP" in caplog.text
