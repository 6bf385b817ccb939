"""A file for tokens that host memory has no room for: every byte back, or one clear error."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headinfer.disk import file as disk_file
from headinfer.disk import transfer
from headinfer.disk.file import SpillFile, aligned_empty
from headinfer.disk.folder import check_folder
from headinfer.disk.regions import Regions
from headinfer.errors import DiskError, OptionError

BLOCK = SpillFile.ALIGNMENT


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[SpillFile]:
    file = SpillFile(str(tmp_path), depth=3, part_bytes=2 * BLOCK)
    yield file
    file.close()


def content(blocks: int, seed: int = 0) -> torch.Tensor:
    memory = aligned_empty(blocks * BLOCK)
    generator = torch.Generator().manual_seed(seed)
    return memory.copy_(torch.randint(256, memory.shape, generator=generator, dtype=torch.uint8))


@pytest.mark.parametrize("direct", [True, False])
def test_every_byte_comes_back(
    tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not direct:
        monkeypatch.setattr(disk_file, "_leave_out_page_cache", lambda fd: False)
    spill = SpillFile(str(tmp_path), part_bytes=2 * BLOCK)
    sizes = [1, 2, 3, 5, 8]
    written = [content(blocks, seed) for seed, blocks in enumerate(sizes)]
    offsets = [spill.allocate(memory.nbytes) for memory in written]
    writes = [spill.write(*each) for each in zip(offsets, written, strict=True)]
    for write in writes:
        write.wait()
    assert all(write.done() for write in writes)
    for offset, memory in reversed(list(zip(offsets, written, strict=True))):
        back = aligned_empty(memory.nbytes)
        spill.read(offset, back).wait()
        assert torch.equal(back, memory)
    spill.close()
    spill.close()


def test_short_transfers_are_continued(spill: SpillFile, monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwritev, os.preadv
    # Cut within a block: a direct transfer goes on where the block began.
    monkeypatch.setattr(os, "pwritev", lambda fd, v, at: min(write(fd, v, at), BLOCK + 7))
    monkeypatch.setattr(os, "preadv", lambda fd, v, at: min(read(fd, v, at), BLOCK + 7))
    memory, back = content(8), aligned_empty(8 * BLOCK)
    spill.write(0, memory).wait()
    spill.read(0, back).wait()
    assert torch.equal(back, memory)


def test_a_file_that_was_cut_short_is_an_error(spill: SpillFile) -> None:
    offset = spill.allocate(4 * BLOCK)
    spill.write(offset, content(4)).wait()
    os.ftruncate(spill._fd, 3 * BLOCK)
    with pytest.raises(DiskError, match="fewer bytes than were written"):
        spill.read(offset, aligned_empty(4 * BLOCK)).wait()


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        ("preadv", errno.EIO, "reading from disk_cache '.*' failed: Input/output error"),
        ("pwritev", errno.EIO, "writing to disk_cache '.*' failed: Input/output error"),
        ("pwritev", errno.ENOSPC, "has no room for 12.00 KiB more"),
    ],
)
def test_a_failing_disk_is_one_error(
    spill: SpillFile, monkeypatch: pytest.MonkeyPatch, call: str, code: int, words: str
) -> None:
    real = getattr(os, call)

    def fail(fd: int, views: list[memoryview], at: int) -> int:
        if at == 2 * BLOCK:
            raise OSError(code, os.strerror(code))
        return int(real(fd, views, at))

    memory = content(3)
    spill.write(0, memory).wait()
    monkeypatch.setattr(os, call, fail)
    transfer = (spill.read if call == "preadv" else spill.write)(0, memory)
    with pytest.raises(DiskError, match=words) as raised:
        transfer.wait()
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_file_that_may_not_grow_has_no_room(tmp_path: Path) -> None:
    code = (
        "import resource, sys\n"
        "from headinfer.disk.file import SpillFile, aligned_empty\n"
        "from headinfer.errors import DiskError\n"
        "file = SpillFile(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "try:\n"
        "    file.write(0, aligned_empty(65536)).wait()\n"
        "except DiskError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "has no room for 64.00 KiB more" in run.stdout
    assert "File too large" in run.stdout


def test_nothing_is_left_behind_a_process_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from headinfer.disk.file import SpillFile, aligned_empty\n"
        "file = SpillFile(sys.argv[1])\n"
        "file.write(0, aligned_empty(65536)).wait()\n"
        "assert os.listdir(sys.argv[1]) == []\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_file_systems_without_unnamed_files_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    spill = SpillFile(str(tmp_path))
    assert os.listdir(tmp_path) == []
    spill.close()


def test_a_closed_file_refuses_what_comes_later(spill: SpillFile) -> None:
    spill.close()
    with pytest.raises(DiskError, match="closed"):
        spill.read(0, aligned_empty(BLOCK))


def test_the_end_of_the_file_is_given_back(spill: SpillFile) -> None:
    first, second = spill.allocate(3 * BLOCK), spill.allocate(2 * BLOCK - 1)
    spill.write(second, content(2)).wait()
    assert os.fstat(spill._fd).st_size == 5 * BLOCK
    spill.free(first, 3 * BLOCK)
    assert spill.allocate(BLOCK) == first
    spill.free(second, 2 * BLOCK - 1)
    assert os.fstat(spill._fd).st_size == spill.size_bytes == BLOCK


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), max_size=40))
def test_regions_never_overlap(steps: list[tuple[int, int]]) -> None:
    regions, taken = Regions(), dict[int, int]()
    for size, freed in steps:
        if freed < len(taken):
            offset = sorted(taken)[freed]
            regions.free(offset, taken.pop(offset))
        else:
            taken[regions.allocate(size)] = size
        spans = sorted(taken.items())
        ends = [offset + size for offset, size in spans]
        assert all(end <= start for end, (start, _) in zip(ends, spans[1:], strict=False))
        assert regions.end == max(ends, default=0)


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, words in (("file", "is a file"), ("none", "is not there")):
        with pytest.raises(OptionError, match=words):
            check_folder(str(tmp_path / name))


def test_threads_that_allocate_and_free_get_regions_of_their_own(spill: SpillFile) -> None:
    held: dict[int, int] = {}
    faults: list[str] = []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(size: int) -> None:
        mine: list[int] = []
        for _ in range(300):
            offset = spill.allocate(size)
            for part in range(offset, offset + size, BLOCK):
                if held.setdefault(part, size) != size:
                    faults.append(f"{part} was handed out twice")
            mine.append(offset)
            if len(mine) > 3:
                freed = mine.pop(0)
                for part in range(freed, freed + size, BLOCK):
                    held.pop(part, None)
                spill.free(freed, size)

    threads = [threading.Thread(target=work, args=(size * BLOCK,)) for size in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    assert not faults


def test_what_a_collector_frees_while_a_region_is_handed_out(
    spill: SpillFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill.allocate(BLOCK)
    last = spill.allocate(BLOCK)
    real = Regions.allocate

    def interleaved(regions: Regions, num_bytes: int) -> int:
        spill.free(last, BLOCK)  # in the same thread, which must not wait for itself
        end = regions.end
        offset = real(regions, num_bytes)
        assert offset == end, "it was freed in the middle"
        return offset

    with monkeypatch.context() as patched:
        patched.setattr(Regions, "allocate", interleaved)
        third = spill.allocate(BLOCK)
    assert spill.allocate(BLOCK) == last != third


def test_a_region_freed_after_the_file_was_closed_cuts_no_other_file(
    spill: SpillFile, tmp_path: Path
) -> None:
    spill.allocate(BLOCK)
    last = spill.allocate(BLOCK)
    spill.close()
    others = [open(tmp_path / f"other{i}", "w+b", buffering=0) for i in range(8)]  # noqa: SIM115
    for other in others:
        other.write(b"x" * 100_000)
    spill.free(last, BLOCK)
    assert all(os.fstat(other.fileno()).st_size == 100_000 for other in others)
    for other in others:
        other.close()


def test_ctrl_c_while_a_transfer_is_waited_for_leaves_none_under_way(
    spill: SpillFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, write = content(4), os.pwritev
    wait, waited = transfer.wait, [0]

    def slowly(*arguments: Any) -> int:
        time.sleep(0.05)
        return write(*arguments)

    def interrupted(parts: Any) -> Any:
        waited[0] += 1
        if waited[0] == 1:
            raise KeyboardInterrupt
        return wait(parts)

    monkeypatch.setattr(os, "pwritev", slowly)
    monkeypatch.setattr(transfer, "wait", interrupted)
    begun = spill.write(spill.allocate(memory.nbytes), memory)
    with pytest.raises(KeyboardInterrupt):
        begun.wait()
    assert begun.done()


def test_what_lies_between_regions_counts_as_free(spill: SpillFile) -> None:
    first, second, third = (spill.allocate(blocks * BLOCK) for blocks in (3, 2, 1))
    assert spill.free_bytes == 0
    spill.free(first, 3 * BLOCK)
    assert spill.free_bytes == 3 * BLOCK
    spill.free(second, 2 * BLOCK)
    assert spill.free_bytes == 5 * BLOCK
    spill.free(third, BLOCK)
    assert (spill.free_bytes, spill.size_bytes) == (0, 0)
