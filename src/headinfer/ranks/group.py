"""What the processes of one model agree on, so that all of them do the same.

A tensor-parallel model adds up its ranks' results in every layer. A rank that calls the model once
more than the others waits for ever. So the ranks agree on what decides about calls, wherever each
of them measures or counts it for itself.
"""

import os
import socket
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import distributed

from headinfer.errors import HeadInferError, MemoryPlanError, RanksError

LOCAL_SIZE_VARIABLE = "LOCAL_WORLD_SIZE"
"""Set by torchrun: how many ranks there are on this host."""

_HASH_BITS = 62

_Result = TypeVar("_Result")


class Ranks:
    """A group of processes that compute one model, or the only process that does.

    Each method waits for the others, which must call it too.

    Args:
        group: of torch; None where the model is in one process.
        device: where the group's tensors lie.

    Attributes:
        size: the number of ranks.
        index: which of them this one is.
        on_host: processes that share this host's memory and cores: those that torchrun started
            here, which may be several groups; without it, those of the group.
    """

    def __init__(
        self,
        group: "distributed.ProcessGroup | None" = None,
        device: torch.device | None = None,
    ) -> None:
        self._group = group
        self._device = device or torch.device("cpu")
        self.size = 1 if group is None else distributed.get_world_size(group)
        self.index = 0 if group is None else distributed.get_rank(group)
        self.on_host = self._count_on_host()

    def _count_on_host(self) -> int:
        if self.size == 1:
            return 1
        given = os.environ.get(LOCAL_SIZE_VARIABLE, "")
        if given.isdecimal() and int(given) > 0:
            return int(given)
        names = self._of_all(socket.gethostname())
        return names.count(socket.gethostname())

    def least(self, *values: int) -> tuple[int, ...]:
        """Return the least that any rank gives for each value."""
        if self._group is None:
            return values
        numbers = torch.tensor(values, dtype=torch.int64, device=self._device)
        distributed.all_reduce(numbers, op=distributed.ReduceOp.MIN, group=self._group)
        return tuple(int(number) for number in numbers.tolist())

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        if self._group is None:
            return flag
        return bool(self.least(int(not flag))[0] == 0)

    def same(self, number: int) -> bool:
        """Whether all ranks give one number."""
        low, high = self.least(number, -number)
        return low == -high

    def together(self, work: Callable[[], _Result]) -> _Result:
        """Return what a function of this rank gives, unless any rank's refuses.

        Raises:
            HeadInferError: this rank's own, or a `MemoryPlanError` with the words of the first rank
                that refused.
        """
        if self._group is None:
            return work()
        result, failure = None, None
        try:
            result = work()
        except HeadInferError as error:
            failure = error
        if not self.any(failure is not None):
            return result  # type: ignore[return-value]  # there was no failure
        said = self._of_all(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        raise MemoryPlanError(next(words for words in said if words))

    def check_same(self, told: int) -> None:
        """Refuse calls of the model that are not the same.

        Args:
            told: a number that stands for what the call brings; see `fingerprint`.

        Raises:
            RanksError: the ranks' calls differ.
        """
        if not self.same(told):
            raise RanksError(
                f"the {self.size} ranks of the model were given different tokens; give all of them "
                "the same prompts, settings and seed (torch.manual_seed) in the same order"
            )

    def _of_all(self, value: str | None) -> list[str | None]:
        """Return what each rank gives."""
        values: list[str | None] = [None] * self.size
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):  # where torch makes tensors of what is sent
                distributed.all_gather_object(values, value, group=self._group)
        else:
            distributed.all_gather_object(values, value, group=self._group)
        return values


ALONE = Ranks()
"""The ranks of a model that is in one process."""


def fingerprint(tokens: torch.Tensor | None, *numbers: int) -> int:
    """Return a number that tells calls of a model apart.

    Args:
        tokens: ids of any shape; None where the call brings none.
        numbers: what else must be the same.
    """
    told = hash(numbers)
    if tokens is not None and not tokens.is_floating_point():
        flat = tokens.detach().reshape(-1).to(torch.int64)
        places = torch.arange(1, flat.numel() + 1, device=flat.device)
        told = hash((told, int((flat * places).sum())))
    return int(told % 2**_HASH_BITS)
