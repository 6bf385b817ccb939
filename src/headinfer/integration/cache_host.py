"""What a cache needs of the attachment it belongs to."""

from typing import TYPE_CHECKING, Any, Protocol

import torch

from headinfer.engine.parted import CacheEngine
from headinfer.engine.stats import Stats
from headinfer.integration.attention import AttentionFunctions
from headinfer.plan.plan import Plan
from headinfer.ranks.group import Ranks
from headinfer.saved.fingerprint import Fingerprint

if TYPE_CHECKING:
    from headinfer.integration.answer_room import AnswerRoom
    from headinfer.integration.disk_below import DiskBelow


class CacheHost(Protocol):
    """A host of caches: what a cache needs of the attachment it belongs to."""

    @property
    def stats(self) -> Stats:
        """Totals of all caches."""

    @property
    def ranks(self) -> Ranks:
        """The processes that compute the model."""

    @property
    def functions(self) -> AttentionFunctions:
        """The attention functions that take what is pending."""

    def plan_for(
        self,
        batch: int,
        context_tokens: int,
        *,
        replacing: CacheEngine | None = None,
        sharing: CacheEngine | None = None,
        dtype: torch.dtype | None = None,
    ) -> Plan:
        """Return the plan for a cache, in place of the one its engine has, or refuse."""

    @property
    def answers(self) -> "AnswerRoom":
        """The memory that an answer may have."""

    @property
    def disk(self) -> "DiskBelow":
        """Below host memory, where one is."""

    def make_engine(self, plan: Plan, dtype: torch.dtype, *, parked: bool = False) -> CacheEngine:
        """Return an engine with its arena allocated, or without one."""

    def kv_dtype(self, computed: torch.dtype | None = None) -> torch.dtype:
        """Return the dtype of KV here, autocast considered, for what the model computes."""

    def check_host_room(self, needed_bytes: int, working_bytes: int, what: str) -> None:
        """Refuse KV without room in host memory, of a cache whose calls compute with some."""

    def new_cache(self, max_tokens: int | None) -> Any:
        """Return an empty `OffloadedCache`, or refuse where the model was detached."""

    def tensor_bytes_left(self, layer_idx: int) -> int:
        """Return the bytes that tensors may still take where a layer is."""

    def fingerprint(self) -> Fingerprint:
        """What the model is known by."""
