"""Folders that nobody else can change, and where they are when the environment says little."""

import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from headinfer import folders
from headinfer.folders import FolderError, cache_folder, private_folder, temporary_folder

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
OTHER = 12345
"""The id of another user."""


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    base = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    return base


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_folders_are_closed_whatever_the_umask(cache):
    before = os.umask(0)
    try:
        folder = private_folder("native")
    finally:
        os.umask(before)
    assert folder == cache / "headinfer" / "native"
    assert [mode(path) for path in (cache, folder.parent, folder)] == [0o700] * 3
    assert private_folder("native") == folder


@pytest.mark.parametrize("variable", ["cache", "./cache", "~/cache", ""])
def test_a_relative_cache_folder_is_ignored(monkeypatch, tmp_path, variable):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "headinfer"


@pytest.mark.parametrize("home", [None, "", "home"])
def test_without_a_home_variable_the_passwd_file_counts(monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_dir="/home/someone"))
    assert cache_folder() == Path("/home/someone/.cache/headinfer")


def unknown(uid: int) -> None:
    raise KeyError(f"getpwuid(): uid not found: {uid}")


def test_no_home_at_all_is_said(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(FolderError, match="set HOME or XDG_CACHE_HOME"):
        cache_folder()


@pytest.mark.parametrize("bits", [0o777, 0o757])
def test_a_folder_that_others_can_write_to_holds_none_of_ours(cache, bits):
    cache.mkdir()
    cache.chmod(bits)
    with pytest.raises(FolderError, match="can be written to by other users"):
        private_folder("native")
    assert list(cache.iterdir()) == []
    cache.chmod(0o1777)  # sticky, as /tmp: nobody can rename what is another's
    assert private_folder("native").is_dir()


def test_a_group_of_nobody_else_may_write(cache, monkeypatch):
    cache.mkdir()
    cache.chmod(0o775)
    members: list[str] = []
    user = SimpleNamespace(pw_name="ann", pw_gid=cache.stat().st_gid)
    group = SimpleNamespace(gr_name="ann", gr_mem=members)
    monkeypatch.setattr(folders.pwd, "getpwuid", lambda uid: user)
    monkeypatch.setattr(folders.grp, "getgrgid", lambda gid: group)
    assert private_folder("native").is_dir()
    members.append("bob")
    with pytest.raises(FolderError, match="can be written to by other users"):
        private_folder("native")
    members.clear()
    group.gr_name = "users"
    with pytest.raises(FolderError, match="can be written to by other users"):
        private_folder("native")


def test_our_own_folder_is_closed_again_and_it_is_said(cache, caplog):
    folder = private_folder("native")
    for path in (folder, folder.parent):
        path.chmod(0o777)
    for _ in range(2):
        private_folder("native")
    assert [mode(path) for path in (folder.parent, folder)] == [0o700] * 2
    said = [record.getMessage() for record in caplog.records]
    closed = "could be written to by other users: it is now closed"
    assert said == [f"{path} {closed}" for path in (folder.parent, folder)]


@as_root
@pytest.mark.parametrize("place", [".", "headinfer", "headinfer/native"])
def test_another_users_folder_is_refused(cache, place):
    private_folder("native")
    os.chown(cache / place, OTHER, OTHER)
    with pytest.raises(FolderError, match="belongs to another user, of id 12345"):
        private_folder("native")


@as_root
def test_what_root_made_serves_others(cache, monkeypatch):
    folder = private_folder("native")
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    assert private_folder("native") == folder
    folder.chmod(0o777)
    with pytest.raises(FolderError, match="can be written to by other users"):
        private_folder("native")
    assert mode(folder) == 0o777


def test_links_are_followed_to_where_they_lead(cache, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    cache.symlink_to(elsewhere)
    assert private_folder("native") == elsewhere / "headinfer" / "native"
    elsewhere.chmod(0o777)
    with pytest.raises(FolderError, match="elsewhere"):
        private_folder("native")


@pytest.mark.parametrize("place", ["file", "link"])
def test_what_is_no_folder_is_refused(cache, place):
    if place == "file":
        cache.write_text("")
    else:
        cache.symlink_to(cache)
    with pytest.raises(OSError, match=r"folder|symbolic"):
        private_folder("native")


TEMPORARY = """
import os, pathlib, sys
from headinfer.folders import temporary_folder
folder = temporary_folder()
assert folder == temporary_folder() and folder.stat().st_mode & 0o7777 == 0o700
(folder / "file").touch()
if sys.argv[1] == "fork":
    if os.fork() == 0:
        assert temporary_folder() != folder
        sys.exit()
    assert os.wait()[1] == 0
if sys.argv[1] == "multiprocessing":
    import multiprocessing
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: (temporary_folder() / "more").touch())
    child.start()
    child.join()
    assert child.exitcode == 0
assert (folder / "file").exists()
assert len(os.listdir(folder.parent.parent)) == (2 if sys.argv[1] == "killed" else 1)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
"""


def run_temporary(how: str, folder: Path) -> int:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH + TEMPORARY, how], env=environment)
    return done.returncode


WITHOUT_TORCH = """
import importlib.util, sys, types
package = types.ModuleType("headinfer")
package.__path__ = importlib.util.find_spec("headinfer").submodule_search_locations
sys.modules["headinfer"] = package
"""
"""The package without what it imports, for that takes seconds."""


def test_a_temporary_folder_ends_with_its_process(tmp_path):
    for how in ("", "fork", "multiprocessing"):
        assert run_temporary(how, tmp_path) == 0
        assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    (tmp_path / "tmpabcdefgh").mkdir()  # another program's
    os.utime(tmp_path / "tmpabcdefgh", (0, 0))
    assert run_temporary("killed", tmp_path) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2
    assert run_temporary("killed", tmp_path) == -signal.SIGKILL  # it counts them, too
    assert len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "tmpabcdefgh").is_dir()


def test_a_temporary_folder_that_others_can_replace_is_refused(monkeypatch, tmp_path):
    tmp_path.chmod(0o777)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folders._temporary_folder.cache_clear()
    with pytest.raises(FolderError, match="can be written to by other users"):
        temporary_folder()
    assert list(tmp_path.iterdir()) == []
