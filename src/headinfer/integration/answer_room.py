"""What an attachment's caches may have of the memory that prompts' activations take."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from headinfer.engine.engine import Engine
from headinfer.engine.parted import CacheEngine
from headinfer.errors import DiskError, MemoryPlanError
from headinfer.integration.answers import end_answer
from headinfer.integration.chunking import is_understood
from headinfer.integration.decode_call import verifies
from headinfer.integration.parts import ModelPart
from headinfer.plan.answering import SHORT_CALL_TOKENS, answering
from headinfer.plan.assistant import AssistantBytes
from headinfer.plan.plan import Plan
from headinfer.schedule.route import MAX_ASKED_TOKENS


def is_short(arguments: dict[str, Any], new_tokens: int) -> bool:
    """Whether a call takes no more memory than a plan for answers leaves.

    Args:
        arguments: of the call, by name.
        new_tokens: of each row.
    """
    if new_tokens == 1:
        return True
    if new_tokens > SHORT_CALL_TOKENS or (new_tokens > MAX_ASKED_TOKENS and verifies(arguments)):
        return False  # or many logits
    return all(is_understood(name, each, multimodal=True) for name, each in arguments.items())


class AnswerRoom:
    """A keeper of the memory that prompts' activations take, for one cache's answer.

    Args:
        parts: of the model.
        engines: of all caches.
        assistants: returns what they take of a device.
    """

    def __init__(
        self,
        parts: Sequence[ModelPart],
        engines: Iterable[CacheEngine],
        assistants: Callable[[torch.device], AssistantBytes],
    ) -> None:
        self._parts = {part.device: part for part in parts}
        self._engines, self._assistants = engines, assistants

    def plan(self, engine: Engine) -> Plan | None:
        """Return the plan for answers of a cache's layers on one device, if it is worth one."""
        part = self._parts[engine.device]
        return answering(engine.plan, part.options, part.hardware)

    def is_free(self, cache_engine: CacheEngine, engine: Engine, plan: Plan) -> bool:
        """Whether nobody else may need the memory: no other cache that has an arena, for one.

        Args:
            cache_engine: of the cache.
            engine: of its layers on one device.
            plan: for answers there.
        """
        others = (each for each in self._engines if each is not cache_engine)
        if not all(each.closed or each.parked for each in others):
            return False
        free = engine.device.free_bytes()
        needed = plan.kv_device_bytes + plan.activation_bytes
        there = free is None or needed <= free + engine.device_kv_bytes
        return there and self.is_assisted_as(engine, plan)

    def is_assisted_as(self, engine: Engine, plan: Plan) -> bool:
        """Whether assistants take of a device what a plan counts with."""
        return self._assistants(engine.device.torch_device) == plan.assistant

    def clear(self) -> None:
        """Have all caches go back to their plans for prompts.

        One that cannot now keeps its plan: its own next call is told why.
        """
        for cache_engine in self._engines:
            for engine in cache_engine.parts:
                if engine.can_change and not engine.parked:
                    with contextlib.suppress(DiskError, MemoryPlanError):
                        end_answer(engine)
