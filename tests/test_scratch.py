"""Folders in the making: removed at the end, and after a killed process by the next."""

import contextlib
import os
import threading
import time
from pathlib import Path

from headinfer import scratch
from headinfer.scratch import (
    make_scratch,
    one_at_a_time,
    remove_leftovers,
    remove_scratch,
    scratch_folder,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_private_and_goes_with_all_that_is_in_it(tmp_path):
    with contextlib.suppress(KeyboardInterrupt), scratch_folder(tmp_path) as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o7777 == 0o700
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_one_in_use_is_not_left_over_however_old(tmp_path):
    with scratch_folder(tmp_path) as folder:
        os.utime(folder, (0, 0))
        remove_leftovers(tmp_path)
        assert names(tmp_path) == [folder.name]


def leave(parent: Path) -> Path:
    """Make a folder and lose its lock, as a process that is killed does."""
    folder, lock = make_scratch(parent)
    os.close(lock)
    (folder / "file").touch()
    return folder


def test_one_that_nobody_holds_is_removed_at_once(tmp_path):
    leave(tmp_path)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_where_locks_are_not_to_be_had_age_tells(tmp_path, monkeypatch):
    def fail(*_arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(scratch.fcntl, "flock", fail)
    folder = leave(tmp_path)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [folder.name]
    two_days_ago_s = time.time() - 2 * 24 * 60 * 60
    os.utime(folder, (two_days_ago_s, two_days_ago_s))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_nothing_but_folders_of_this_user_is_removed(tmp_path):
    target, link = tmp_path / "target", tmp_path / "headinfer-scratch-link0000"
    target.mkdir()
    link.symlink_to(target)
    file = tmp_path / "headinfer-scratch-file0000"
    file.touch()
    kept = [file.name, link.name, target.name]
    if os.geteuid() == 0:
        others = leave(tmp_path)
        os.chown(others, 12345, 12345)
        kept.append(others.name)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(kept)


def test_one_that_is_taken_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    taken = []
    lock = scratch.fcntl.flock

    def take_first(descriptor: int, how: int) -> None:
        if not taken:
            (folder,) = tmp_path.iterdir()
            taken.append(folder)
            folder.rmdir()
        lock(descriptor, how)

    monkeypatch.setattr(scratch.fcntl, "flock", take_first)
    folder, held = make_scratch(tmp_path)
    assert folder.is_dir()
    assert folder != taken[0]
    remove_scratch(folder, held)


def test_one_at_a_time_enters(tmp_path):
    seen = []

    def enter() -> None:
        with one_at_a_time(tmp_path):
            seen.append("other")

    other = threading.Thread(target=enter)
    with one_at_a_time(tmp_path):
        other.start()
        other.join(0.2)
        seen.append("first")
    other.join()
    assert seen == ["first", "other"]


def test_nobody_waits_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "_PATIENCE_S", 0.05)
    with one_at_a_time(tmp_path), one_at_a_time(tmp_path):
        pass


def test_a_folder_that_is_not_there_has_no_leftovers(tmp_path):
    remove_leftovers(tmp_path / "missing")
