"""`headinfer generate` in two ranks, one of which fails amidst its answer."""

import os
import sys

from headinfer.cli import entry
from headinfer.generation.call import Generation


def fail(_generation: Generation) -> None:
    raise LookupError("something nobody foresaw")


if __name__ == "__main__":
    if os.environ["RANK"] == sys.argv.pop():
        Generation._raise_if_no_numbers = fail
    entry.run()
