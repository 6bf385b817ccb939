"""What torchrun says of this process, and joining the other ranks it started."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from headinfer.errors import OptionError, RanksError, reason_of
from headinfer.units import counted

_STARTED = "torchrun --nproc-per-node N -m headinfer generate --tensor-parallel"

_PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others, which may read their weights slowly."""

_FAILED = "headinfer/failed"


def is_another() -> bool:
    """Whether torchrun started this process beside one that prints for it."""
    return "LOCAL_WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A place among the processes that torchrun started.

    Attributes:
        rank: which of them this is.
        local_rank: which of those on this host; also the number of its GPU.
        size: how many there are.
        on_host: how many of them are on this host.
    """

    rank: int
    local_rank: int
    size: int
    on_host: int

    @classmethod
    def of(cls, variables: Mapping[str, str] = os.environ) -> "Launched | None":
        """Return what torchrun set; None where it did not start this process.

        Raises:
            RanksError: a variable is no number.
        """
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        if not all(name in variables for name in names):
            return None
        values = [variables[name] for name in names]
        if not all(value.isdecimal() for value in values):
            given = ", ".join(
                f"{name}={value!r}" for name, value in zip(names, values, strict=True)
            )
            raise RanksError(f"ranks are started by torchrun, which sets numbers: {given}")
        rank, local_rank, size, on_host = map(int, values)
        return cls(rank=rank, local_rank=local_rank, size=size, on_host=on_host)

    @classmethod
    def wanted(cls) -> "Launched":
        """Return the place of a process that was asked to be a rank.

        Raises:
            RanksError: torchrun did not start it, or it alone.
        """
        launched = cls.of()
        if launched is None:
            raise RanksError(
                f"tensor parallelism needs a process for each rank: start it by `{_STARTED}`"
            )
        if launched.size < 2:
            raise RanksError(
                "tensor parallelism needs 2 ranks or more, and torchrun started 1; give it "
                "--nproc-per-node 2, or run headinfer by itself"
            )
        return launched

    def join(self, device: str) -> None:
        """Wait for the other ranks, and take this one's GPU.

        Args:
            device: "cuda", with NCCL, or another kind, with gloo.

        Raises:
            OptionError: there are more ranks on this host than GPUs.
            RanksError: the others cannot be reached.
        """
        import torch
        from torch import distributed

        place = None
        if device == "cuda":
            gpus = torch.cuda.device_count()
            if self.on_host > gpus:
                raise OptionError(
                    f"this host has {counted(self.on_host, 'rank')} and {counted(gpus, 'GPU')}; "
                    "start as many ranks as there are GPUs, or give device=cpu"
                )
            place = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(place)
        try:
            distributed.init_process_group(
                "nccl" if device == "cuda" else "gloo", device_id=place, timeout=_PATIENCE
            )
        except (RuntimeError, ValueError) as error:
            raise RanksError(
                f"the {self.size} ranks do not find each other: {reason_of(error)}"
            ) from error

    def is_first_to_fail(self) -> bool:
        """Whether no other rank failed before; asked once they have joined, and waits for none."""
        from torch import distributed

        try:
            store = distributed.distributed_c10d._get_default_store()
            return int(store.add(_FAILED, 1)) == 1
        except RuntimeError:  # whoever kept the store is gone, and had failed then
            return False
