"""What each rank of a trial runs: `python -m headinfer.bench.rank_program FOLDER PID`.

It reads the trial from the folder and writes its outcome there. It ends with the process PID.
"""

import ctypes
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from headinfer.bench.build import torch_device
from headinfer.bench.ranked import TRIAL, answer_file
from headinfer.bench.result import TrialFailure, TrialResult, to_json
from headinfer.bench.spec import TrialSpec
from headinfer.bench.trial import failure_of, run_trial
from headinfer.ranks.launched import Launched
from headinfer.ranks.leaving import leave_at_once, leave_together
from headinfer.ranks.near import stay_near

_PR_SET_PDEATHSIG = 1
"""What `prctl` of Linux calls the signal that comes when the parent ends."""


def _end_with(parent: int) -> None:
    """Be killed when the process that started this one is, as where a trial takes too long."""
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended while this one began
        os._exit(1)


def _outcome(spec: TrialSpec, launched: Launched) -> TrialResult | TrialFailure:
    try:
        torch.set_num_threads(stay_near(launched.local_rank, launched.on_host))
        launched.join(torch_device(spec.settings).type)
        return run_trial(spec)
    except Exception as error:  # any error becomes a row
        return failure_of(error)


def main(folder: Path, parent: int) -> None:
    """Measure this rank's part of a trial, and end the process."""
    _end_with(parent)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    launched = Launched.wanted()
    spec = TrialSpec.from_json(json.loads((folder / TRIAL).read_text()))
    outcome = _outcome(spec, launched)
    file = answer_file(folder, launched.rank)
    begun = file.with_suffix(".begun")
    begun.write_text(json.dumps({"at_s": time.monotonic(), "outcome": to_json(outcome)}))
    begun.replace(file)
    if isinstance(outcome, TrialFailure):
        leave_at_once(1)
    leave_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
