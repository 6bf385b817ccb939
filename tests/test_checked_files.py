"""Files are what was written, and nobody else's, or they are refused."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from headinfer.checked_files import (
    DIGESTS,
    DamagedError,
    check_folder,
    check_sealed,
    read_private,
    seal_folder,
    write_sealed,
)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def sealed(tmp_path) -> Path:
    path = tmp_path / "a kernel"
    write_sealed(path, CONTENT)
    return path


def test_a_sealed_file_begins_with_its_content_and_is_private(sealed):
    check_sealed(sealed)
    assert sealed.read_bytes()[: len(CONTENT)] == CONTENT
    assert sealed.stat().st_mode & 0o7777 == 0o600


@pytest.mark.parametrize("kept_bytes", [0, 1, 31, 32, 4096, len(CONTENT), len(CONTENT) + 31])
def test_a_file_cut_short_is_damaged(sealed, kept_bytes):
    os.truncate(sealed, kept_bytes)
    with pytest.raises(DamagedError):
        check_sealed(sealed)


@pytest.mark.parametrize("at", [0, 5000, len(CONTENT), -1])
def test_a_file_with_another_byte_is_damaged(sealed, at):
    content = bytearray(sealed.read_bytes())
    content[at] ^= 1
    sealed.write_bytes(content)
    with pytest.raises(DamagedError, match="not what was written"):
        check_sealed(sealed)


def test_a_file_under_another_name_is_damaged(sealed):
    with pytest.raises(DamagedError):
        check_sealed(sealed.rename(sealed.with_name("another kernel")))


def test_only_regular_files_are_read(tmp_path, sealed):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(sealed)
    with pytest.raises(DamagedError, match="not a regular file"):
        read_private(pipe)
    with pytest.raises(DamagedError, match="it is a symbolic link"):
        read_private(link)
    with pytest.raises(IsADirectoryError):
        read_private(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_private(tmp_path / "nothing")


def test_no_more_is_read_than_was_asked_for(sealed):
    size = sealed.stat().st_size
    assert len(read_private(sealed, size)) == size
    with pytest.raises(DamagedError, match=f"more than {size - 1} bytes"):
        read_private(sealed, size - 1)


@pytest.mark.parametrize("bits", [0o620, 0o602])
def test_a_file_that_others_can_write_to_is_refused(sealed, bits):
    sealed.chmod(bits)
    with pytest.raises(DamagedError, match="other users can write to it"):
        check_sealed(sealed)


@as_root
def test_a_file_of_another_user_is_refused_and_roots_is_not(sealed, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    check_sealed(sealed)
    os.chown(sealed, 12346, 12346)
    with pytest.raises(DamagedError, match="belongs to another user, of id 12346"):
        check_sealed(sealed)


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model"
    path.mkdir(mode=0o777)
    for name in ("config.json", "model.safetensors"):
        (path / name).write_text(f"what {name} holds")
        (path / name).chmod(0o666)
    seal_folder(path)
    return path


def test_a_sealed_folder_is_private_and_known_to_sha256sum(folder):
    check_folder(folder)
    assert folder.stat().st_mode & 0o7777 == 0o700
    assert {path.stat().st_mode & 0o7777 for path in folder.iterdir()} == {0o600}
    (folder / ".hidden").touch()
    check_folder(folder)
    if shutil.which("sha256sum"):
        subprocess.run(
            ["sha256sum", "--check", "--strict", "--quiet", DIGESTS], cwd=folder, check=True
        )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "more.json").touch(), "more.json is not one of its files"),
        (lambda folder: os.truncate(folder / "config.json", 3), "config.json is not what was"),
        (lambda folder: (folder / "config.json").chmod(0o666), "config.json: other users can"),
        (lambda folder: os.truncate(folder / DIGESTS, 0), "is not one of its files"),
        (lambda folder: os.truncate(folder / DIGESTS, 100), "SHA256SUMS is not what was"),
        (lambda folder: (folder / DIGESTS).write_bytes(b"\xff\xfe"), "SHA256SUMS is not what"),
    ],
)
def test_a_folder_with_anything_else_in_it_is_damaged(folder, damage, words):
    damage(folder)
    with pytest.raises(DamagedError, match=words):
        check_folder(folder)


def test_a_folder_without_digests_or_no_folder_cannot_be_read(folder):
    (folder / DIGESTS).unlink()
    with pytest.raises(OSError, match=DIGESTS):
        check_folder(folder)
    with pytest.raises(OSError, match="missing"):
        check_folder(folder.with_name("missing"))
