"""How fast a disk is read for seconds on end, with nothing else going on, beside `headinfer probe`.

    python benchmarks/disk_read.py /mnt/nvme --json benchmarks/results/gpu-disk-reads.json

A decode step above a disk is bound by the best of the probe's stretches, which last a tenth of a
second. Two readers read as many bytes as a step of Llama-3-8B at 100K tokens does, over and over.
`cache` reads tiles by our own file, as many at a time as a step does. `plain` reads the same file,
and shares no code with it: threads, `os.preadv` and O_DIRECT. Its blocks are as large, and it has
more of them at once, too. Readers take turns, as a shared disk gives now more and now less.

Where both stay below the best stretch, so must a step. Where `plain` alone reaches it, our reading
is at fault.
"""

import argparse
import collections
import itertools
import json
import mmap
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from headinfer.disk.file import DEPTH, PART_BYTES, SpillFile, aligned_empty
from headinfer.disk.mount import free_bytes, mount_of
from headinfer.disk.transfer import Transfer
from headinfer.errors import HeadInferError, OptionError
from headinfer.folders import describe
from headinfer.plan.disk_blocks import READS
from headinfer.probe.disk import how, measure_disk
from headinfer.units import format_bytes, parse_bytes

STRETCH_BYTES = 256 * 2**20
"""Of the probe's stretches, and of those whose rates are told here."""


class Clock:
    """A record of when bytes came, from which rates follow.

    Args:
        seconds: how long to read.
        size_bytes: of all that is read over and over; once at least.
    """

    def __init__(self, seconds: float, size_bytes: int) -> None:
        self._seconds, self._size_bytes = seconds, size_bytes
        self._came: list[tuple[float, int]] = []
        self._read_bytes = 0
        self._lock = threading.Lock()
        self._began_s = time.perf_counter()

    def done(self, num_bytes: int) -> bool:
        """Note bytes that were read; return whether to go on."""
        with self._lock:
            now_s = time.perf_counter() - self._began_s
            self._read_bytes += num_bytes
            self._came.append((now_s, self._read_bytes))
            return now_s < self._seconds or self._read_bytes < self._size_bytes

    def rates(self) -> dict[str, Any]:
        """Return the mean rate, and the stretches' rates."""
        marks, wanted = [(0.0, 0)], STRETCH_BYTES
        for now_s, read_bytes in self._came:
            if read_bytes >= wanted:
                marks.append((now_s, read_bytes))
                wanted = read_bytes + STRETCH_BYTES
        marks[max(len(marks) - 1, 1) :] = [self._came[-1]]  # the last one has the rest
        per_s = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(marks)]
        seconds, read_bytes = self._came[-1]
        return {
            "read_bytes": read_bytes,
            "seconds": seconds,
            "read_bytes_per_s": read_bytes / seconds,
            "best_read_bytes_per_s": max(per_s),
            "median_read_bytes_per_s": statistics.median(per_s),
            "least_read_bytes_per_s": min(per_s),
        }


def fill(file: SpillFile, start: int, size_bytes: int, buffers: Sequence[torch.Tensor]) -> None:
    """Write random bytes, several tiles at a time."""
    under_way: collections.deque[Transfer] = collections.deque()
    for buffer in buffers:
        buffer.random_(256)
    for place, buffer in zip(
        range(0, size_bytes, buffers[0].nbytes), itertools.cycle(buffers), strict=False
    ):
        if len(under_way) == len(buffers):
            under_way.popleft().wait()
        under_way.append(file.write(start + place, buffer))
    while under_way:
        under_way.popleft().wait()


def read_by_cache(
    file: SpillFile, places: Iterator[int], buffers: Sequence[torch.Tensor], clock: Clock
) -> None:
    """Read tiles as a cache does: one is waited for while the others are on their way."""
    under_way: collections.deque[Transfer] = collections.deque()
    try:
        for buffer in itertools.cycle(buffers):
            if len(under_way) == len(buffers):
                under_way.popleft().wait()
                if not clock.done(buffer.nbytes):
                    return
            under_way.append(file.read(next(places), buffer))
    finally:
        for transfer in under_way:
            transfer.settle()


def open_again(fd: int) -> tuple[int, bool]:
    """Open an open file to be read past the page cache, and return whether that works."""
    name = f"/proc/self/fd/{fd}"
    try:
        again = os.open(name, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return os.open(name, os.O_RDONLY), False
    with mmap.mmap(-1, PART_BYTES) as block:
        try:
            os.preadv(again, [block], 0)
        except OSError:  # some file systems find out only now
            os.close(again)
            return os.open(name, os.O_RDONLY), False
    return again, True


def read_plainly(fd: int, direct: bool, places: Iterator[int], clock: Clock, depth: int) -> None:
    """Have threads read blocks, each the next one, until the clock says so."""
    turns = threading.Lock()
    failed: list[OSError] = []

    def read() -> None:
        with mmap.mmap(-1, PART_BYTES) as block:
            going = True
            while going and not failed:
                with turns:
                    place = next(places)
                try:
                    read_bytes = os.preadv(fd, [block], place)
                except OSError as error:
                    failed.append(error)
                    return
                if not direct:
                    os.posix_fadvise(fd, place, PART_BYTES, os.POSIX_FADV_DONTNEED)
                going = clock.done(read_bytes)

    threads = [threading.Thread(target=read) for _ in range(depth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def measure(
    folder: str, size_bytes: int, tile_bytes: int, seconds: float, depths: Sequence[int]
) -> dict[str, Any]:
    """Return what the probe and both readers find.

    Raises:
        OptionError: the folder cannot be used, or has too little free space.
        DiskError: the disk fails.
    """
    rate = measure_disk(folder, quick=False)
    free = free_bytes(folder)
    if free < size_bytes:
        raise OptionError(
            f"disk {folder!r} has {format_bytes(free)} free, and {format_bytes(size_bytes)} are to "
            "be read; free space, name another folder or give a smaller --size"
        )
    rows: list[dict[str, Any]] = []
    file = SpillFile(folder)
    try:
        start = file.allocate(size_bytes)
        buffers = [aligned_empty(tile_bytes) for _ in range(READS)]
        fill(file, start, size_bytes, buffers)
        fd, direct = open_again(file._fd)
        try:
            for reader, depth in [("cache", DEPTH), *(("plain", each) for each in depths)] * 2:
                clock, ours = Clock(seconds, size_bytes), reader == "cache"
                step = tile_bytes if ours else PART_BYTES
                places = itertools.cycle(range(start, start + size_bytes, step))
                if ours:
                    read_by_cache(file, places, buffers, clock)
                else:
                    read_plainly(fd, direct, places, clock, depth)
                past_cache = file.direct if ours else direct
                row = {"reader": reader, "depth": depth, "direct": past_cache}
                rows.append(row | clock.rates())
        finally:
            os.close(fd)
    finally:
        file.close()
    return {
        "disk": mount_of(folder).said,
        "probed": how(rate, folder),
        "probe": asdict(rate),
        "size_bytes": size_bytes,
        "tile_bytes": tile_bytes,
        "tiles_ahead": READS,
        "block_bytes": PART_BYTES,
        "rows": rows,
    }


def main() -> int:
    """Measure and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="on the disk")
    parser.add_argument("--size", default="9GiB", help="bytes that are read over and over")
    parser.add_argument("--tile", default="16MiB", help="of a tile's keys and values")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn, at least")
    parser.add_argument(
        "--depths",
        type=int,
        nargs="+",
        default=[8, 16, 32],
        help="blocks that `plain` reads at once",
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    try:
        tile_bytes = parse_bytes(arguments.tile, "--tile")
        size_bytes = parse_bytes(arguments.size, "--size") // tile_bytes * tile_bytes
        if tile_bytes % PART_BYTES or not size_bytes:
            raise OptionError(
                f"--tile {arguments.tile} and --size {arguments.size}: give a multiple of "
                f"{format_bytes(PART_BYTES)}, and no smaller size"
            )
        document = measure(
            arguments.folder, size_bytes, tile_bytes, arguments.seconds, arguments.depths
        )
    except (HeadInferError, OSError) as error:
        said = describe(error) if isinstance(error, OSError) else error
        print(f"disk_read.py {arguments.folder}: {said}", file=sys.stderr)
        return 2
    typical, best = (
        document["probe"][name] for name in ("read_bytes_per_s", "best_read_bytes_per_s")
    )
    print(
        f"probe: median {typical / 1e9:.2f} GB/s, best stretch {best / 1e9:.2f} "
        f"({document['probed']})"
    )
    for row in document["rows"]:
        mean, least, most = (
            row[f"{name}read_bytes_per_s"] / 1e9 for name in ("", "least_", "best_")
        )
        print(
            f"{row['reader']}, {row['depth']:2d} at once: {mean:.2f} GB/s over "
            f"{row['seconds']:.1f} s, stretches {least:.2f} to {most:.2f}; the probe's best is "
            f"{best / 1e9 / mean:.2f} times the mean"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
