"""A verb in several processes, which torchrun started: one of them speaks for all."""

import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from typing import Any

from headinfer.cli.console import let_speak
from headinfer.errors import RanksError
from headinfer.ranks.launched import Launched
from headinfer.ranks.leaving import leave_at_once, leave_together

_ON_GPU = ("auto", "cuda")


def check_alone(verb: str) -> None:
    """Refuse to do in each of several processes what is for one.

    Args:
        verb: what was asked for.

    Raises:
        RanksError: torchrun started more than one.
    """
    launched = Launched.of()
    if launched is not None and launched.size > 1:
        how = "add --tensor-parallel" if verb == "generate" else "only generate has ranks"
        raise RanksError(
            f"torchrun started {launched.size} ranks, and {verb} would run in each of them; "
            f"{how}, or run headinfer by itself"
        )


def begin(device: str) -> Launched:
    """Become a rank, before torch is imported: only the first one prints.

    Args:
        device: as in `attach`.

    Raises:
        RanksError: torchrun did not start several.
    """
    launched = Launched.wanted()
    # What NCCL and torch warn of beside our own message is no news to users.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if device not in _ON_GPU:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # transformers takes a GPU wherever there is one
    if launched.rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    # torchrun ends the other ranks once one has failed, which may wait for it in a library.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return launched


def join(launched: Launched, device: str, threads: int | None) -> None:
    """Wait for the other ranks, and take this one's GPU and cores.

    Args:
        launched: from `begin`.
        device: "cpu", "cuda" or "simulated".
        threads: of torch; None for this rank's share of the cores.

    Raises:
        HeadInferError: they do not find each other, or there are too few GPUs.
    """
    import torch

    from headinfer.ranks.near import stay_near

    share = stay_near(launched.local_rank, launched.on_host)
    if threads is None:  # torchrun gives each rank one, however many cores there are
        torch.set_num_threads(share)
    launched.join(device)
    let_speak(launched.is_first_to_fail)


def draw_seed(ranks: Any) -> int:
    """Return a seed that all ranks draw alike."""
    return int(ranks.least(secrets.randbelow(2**31))[0])


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """End a rank's process: at once where it fails, and else with all others."""
    try:
        yield
    except SystemExit as error:
        from_torch = sys.modules.get("torch.distributed")
        if from_torch is None or not from_torch.is_initialized():
            raise
        if error.code:
            leave_at_once(error.code if isinstance(error.code, int) else 1)
        leave_together()
