"""A kernel that has to prepare for every new shape, used where that is worth it."""

import logging

import torch

from headinfer.attend.check import agrees
from headinfer.attend.partial import Kernel, Partial

_logger = logging.getLogger(__name__)


class PreparedKernel(Kernel):
    """One kernel for calls that are worth its preparation, and another for all else.

    The one is loaded, and checked, when the first such call comes: for cuDNN that took 1.5 s, which
    no short prompt is to wait for. Where it fails its check the other serves all calls.

    Args:
        prepared: what has to prepare for every new shape.
        other: what serves the rest.
        least_pairs: query rows x keys of one head from which a call is worth it.
    """

    def __init__(self, prepared: Kernel, other: Kernel, *, least_pairs: int) -> None:
        self._prepared = prepared
        self._other = other
        self._least_pairs = least_pairs
        self._works: bool | None = None  # not known yet

    @property
    def name(self) -> str:  # type: ignore[override]  # changes when the check fails
        """What to call it."""
        if self._works is False:
            return self._other.name
        return f"{self._prepared.name} and {self._other.name}"

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        causal: bool = False,
        mask: torch.Tensor | None = None,
    ) -> Partial:
        """Attend by the kernel that the call is worth; see `Kernel.attend`."""
        worth = mask is None and self._is_worth_it(query, keys, causal)
        serving = self._prepared if worth and self._check(query) else self._other
        return serving.attend(query, keys, values, scale=scale, causal=causal, mask=mask)

    def _is_worth_it(self, query: torch.Tensor, keys: torch.Tensor, causal: bool) -> bool:
        group, q_len = query.shape[2:4]
        if group * q_len * keys.shape[2] < self._least_pairs:
            return False
        # Of a prompt's causal squares the last has a length of its own, and all others the plan's
        # chunk, which is a power of two: only those come again.
        return not causal or q_len.bit_count() == 1

    def _check(self, query: torch.Tensor) -> bool:
        """Whether the prepared kernel works."""
        if self._works is None:
            self._works = agrees(self._prepared, query.device, query.dtype, query.shape[4])
            if not self._works:
                _logger.warning(
                    "%s fails its check here; %s is used", self._prepared.name, self._other.name
                )
        return self._works
