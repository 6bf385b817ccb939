"""`headinfer generate` in two ranks, one of which fails amidst its answer, or its disk does.

The last argument is the rank, and how: `1 answer`, `1 disk`.
"""

import errno
import os
import sys

from headinfer.cli import entry
from headinfer.generation.call import Generation


def fail(_generation: Generation) -> None:
    raise LookupError("something nobody foresaw")


def fill_the_disk() -> None:
    """Have the disk be full for what is longer than a trial of it."""
    write = os.pwritev

    def full(fd: int, buffers: list[memoryview], offset: int) -> int:
        if len(buffers[0]) > 4096:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, buffers, offset)

    os.pwritev = full


if __name__ == "__main__":
    rank, how = sys.argv.pop().split()
    if os.environ["RANK"] == rank:
        if how == "disk":
            fill_the_disk()
        else:
            Generation._raise_if_no_numbers = fail
    entry.run()
