"""The parts of an attached model: the layers that compute on one device, and what it gives them."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from headinfer.by_context import ByContext
from headinfer.device.base import Device
from headinfer.device.host_memory import available_host_bytes
from headinfer.device.make import measured_hardware
from headinfer.engine.balance import Settled
from headinfer.engine.engine import Engine
from headinfer.engine.parted import CacheEngine
from headinfer.errors import MemoryPlanError, UnsupportedModelError
from headinfer.integration.host_format import packing_works, with_kv_dtype
from headinfer.integration.placement import Placement
from headinfer.plan import memory
from headinfer.plan.assistant import AssistantBytes
from headinfer.plan.below_host import InBlocks
from headinfer.plan.form_choice import with_chosen_form
from headinfer.plan.format import Format
from headinfer.plan.hardware import Hardware
from headinfer.plan.joining import joined
from headinfer.plan.narrow import narrowed, with_fewer_residents
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan, part_label
from headinfer.plan.resolve import resolve
from headinfer.plan.shape import ModelShape
from headinfer.plan.whole import passing_whole
from headinfer.ranks.group import Ranks
from headinfer.units import format_bytes

_NO_DISK = InBlocks()

USED_SHARE = 0.9
"""Share of the free GPU memory that plans use.

The rest is left for fragments and for what the estimates leave out.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPart:
    """A part of a model: the layers whose tokens lie on one device.

    Attributes:
        device: where their attention is computed.
        layers: which layers, counted among those that attend.
        shape: the model's, with these layers and the weights on the device alone.
        options: with the memory of this device.
        hardware: what was measured of it; None for nothing.
        label: names the part in messages; empty where it is all of the model.
        shares: of the CPU, which caches have settled on.
    """

    device: Device
    layers: tuple[int, ...]
    shape: ModelShape
    options: Options
    hardware: Hardware | None
    label: str
    shares: ByContext[Settled] = field(default_factory=ByContext)

    def resolve(
        self,
        batch: int,
        context_tokens: int | None,
        others: Sequence[Engine],
        dtype: torch.dtype,
        assistant: AssistantBytes,
        chunk_tokens: int | None = None,
        in_blocks: InBlocks = _NO_DISK,
        replaced: Engine | None = None,
        form: Format | None = None,
    ) -> Plan:
        """Return the plan of a cache's layers here, beside what other caches have on the device.

        Args:
            batch: rows.
            context_tokens: tokens expected in each; None when not known yet.
            others: the engines of other caches on this device.
            dtype: of keys and values.
            assistant: what assistants take of this device.
            chunk_tokens: tokens of a chunk that all parts can pass; None for the best here.
            in_blocks: as in `headinfer.plan.resolve.resolve`.
            replaced: the cache's engine here, if it has one, whose memory goes first.
            form: of the tokens that the cache has; None where the plan chooses what is open.

        Raises:
            MemoryPlanError: no plan fits.
        """
        asked = self.options.device_memory_bytes
        budget = self._budget_bytes([*others, replaced] if replaced else others, assistant)
        left = budget
        if budget is not None:
            # What they may come to hold: windows are there only while they have tokens.
            held = sum(engine.plan.kv_device_bytes for engine in others)
            left = max(budget - held - assistant.total_bytes, 1)
            if left == 1 and assistant.total_bytes:
                raise MemoryPlanError(
                    f"{self.label}the assistant takes {format_bytes(assistant.total_bytes)}, which "
                    f"leaves nothing of the {format_bytes(budget)} of device memory; give more of "
                    "it, or no assistant"
                )
        options = dataclasses.replace(self.options, device_memory_bytes=left)
        if chunk_tokens is not None:
            options = dataclasses.replace(options, chunk_tokens=chunk_tokens)
        shape = with_kv_dtype(self.shape, dtype)
        if form is not None or dtype is not torch.bfloat16:
            options = dataclasses.replace(options, kv_cache=shape.host_format.value)
        resolved = functools.partial(
            resolve,
            device=self.device.name,
            batch=batch,
            context_tokens=context_tokens,
            hardware=self.hardware,
            in_blocks=in_blocks,
        )
        try:
            shape = shape.packed if form is Format.PACKED else shape
            works = functools.partial(packing_works, self.device, shape.packed)
            plan = with_chosen_form(shape, options, self.hardware, resolved, works)
        except MemoryPlanError as error:
            reason = f"{self.label}{error}"
            if budget != asked:
                wanted = "" if asked is None else f", not the {format_bytes(asked)} asked for"
                reason = f"{reason}; that is all the device has free{wanted}"
            if assistant.total_bytes:
                taken = format_bytes(assistant.total_bytes)
                reason = f"{reason}; an assistant takes {taken} beside that"
            raise MemoryPlanError(reason) from None
        if left is not None:
            left += assistant.total_bytes
        return dataclasses.replace(plan, assistant=assistant, device_memory_bytes=left)

    def _budget_bytes(self, engines: Sequence[Engine], assistant: AssistantBytes) -> int | None:
        """Return the device memory for weights, runtime, activations and all caches together.

        That is what was asked for as far as the device has it, or most of what is free. Weights
        and CUDA's context are there already and so not free; what caches hold counts as free.
        """
        asked, free = self.options.device_memory_bytes, self.device.free_bytes()
        if free is None:
            return asked
        free += sum(engine.device_kv_bytes for engine in engines)
        weights = self.shape.weights_bytes + assistant.weights_bytes
        runtime = memory.runtime_bytes(self.device.name)
        most = weights + runtime + int(free * USED_SHARE)
        if asked is None:
            return most
        # The rest of the runtime, handles and fragments, is still to come out of what is free.
        return min(asked, max(most, weights + free))


def planned_together(
    parts: Sequence[ModelPart],
    shape: ModelShape,
    batch: int,
    context_tokens: int | None,
    others: Sequence[Sequence[Engine]],
    dtype: torch.dtype,
    assistants: Callable[[torch.device], AssistantBytes],
    disk_room_bytes: int | None = None,
    replaced: Sequence[Engine] = (),
    form: Format | None = None,
) -> Plan:
    """Return the plan of a cache, whose parts pass chunks of as many tokens.

    Args:
        parts: of the model.
        shape: of the whole model.
        batch: rows.
        context_tokens: tokens expected in each; None when not known yet.
        others: the engines of each other cache, one for each part.
        dtype: of the cache's keys and values.
        assistants: returns what they take of a device.
        disk_room_bytes: host memory for all parts, where a disk lies below it; None for no disk.
        replaced: the cache's engines, one for each part; none where it is new.
        form: as in `ModelPart.resolve`.

    Raises:
        MemoryPlanError: no plan fits.
    """

    def planned(number: int, chunk_tokens: int | None = None) -> Plan:
        here = [engines[number] for engines in others]
        part = parts[number]
        assistant = assistants(part.device.torch_device)
        beside = (each.shape for each in parts if each is not part)
        shapes = tuple(with_kv_dtype(other, dtype) for other in beside)
        own = replaced[number] if replaced else None
        sizes = (chunk_tokens, InBlocks(disk_room_bytes, shapes), own, form)
        return part.resolve(batch, context_tokens, here, dtype, assistant, *sizes)

    plans = [planned(number) for number in range(len(parts))]
    least = min(plan.chunk_tokens for plan in plans)  # a chunk passes through all parts
    plans = [
        plan if plan.chunk_tokens == least else planned(number, least)
        for number, plan in enumerate(plans)
    ]
    return joined(with_kv_dtype(shape, dtype), plans)


def making_room(plan: Plan, others: Sequence[Sequence[Engine]]) -> Plan:
    """Have calls of other caches pass fewer tokens at once, where a new plan leaves no room.

    Args:
        plan: of a cache, whose device memory leaves out what the others hold; it is returned.
        others: the engines of each other cache, one for each part.
    """
    for number, own in enumerate(plan.of_devices):
        if own.device_memory_bytes is not None:
            kept = own.total_device_bytes - own.activation_bytes
            for other in (engines[number] for engines in others):
                other.plan = narrowed(other.plan, own.device_memory_bytes - kept)
    return plan


def passing_together(
    parts: Sequence[ModelPart], plans: Sequence[Plan], tokens: int, ranks: Ranks
) -> list[Plan]:
    """Return the plans of a cache's parts, changed for a call whose tokens all pass at once.

    Raises:
        MemoryPlanError: a device does not hold the activations of so many tokens.
    """
    whole = ranks.together(
        lambda: [
            passing_whole(plan, part.options, tokens)
            for part, plan in zip(parts, plans, strict=True)
        ]
    )
    least = ranks.least(*(plan.resident_tokens for plan in whole))
    return [with_fewer_residents(*each) for each in zip(whole, least, strict=True)]


def whole_together(
    parts: Sequence[ModelPart],
    plan: Plan,
    engine: CacheEngine | None,
    batch: int,
    tokens: int,
    ranks: Ranks,
) -> Plan:
    """Return the plan of a cache, changed for a call whose tokens all pass at once.

    Args:
        parts: of the model.
        plan: of one row, for a cache without an engine.
        engine: of the cache, which goes on under the new plan; None where it has none.
        batch: rows.
        tokens: of each row, in the call.
        ranks: the processes that compute the model.

    Raises:
        MemoryPlanError: a device does not hold the activations of so many tokens.
    """
    if engine is None:
        plans = [dataclasses.replace(own, batch=batch) for own in plan.of_devices]
        return joined(plan.shape, passing_together(parts, plans, tokens, ranks))
    whole = passing_together(parts, [own.plan for own in engine.parts], tokens, ranks)
    go_on_under(whole, engine.parts)
    return joined(engine.plan.shape, whole)


def bytes_left(device: Device) -> int:
    """Return the bytes that tensors may still take on a device."""
    free = device.free_bytes()
    return available_host_bytes() if free is None else int(free * USED_SHARE)


def go_on_under(plans: Sequence[Plan], engines: Sequence[Engine]) -> None:
    """Have the engines of a cache go on under other plans, one for each."""
    for plan, engine in zip(plans, engines, strict=True):
        if plan.arena_bytes == engine.plan.arena_bytes:
            engine.plan = plan
        else:
            with engine.in_use():
                engine.replan(plan)


def parts_of(
    shape: ModelShape,
    placement: Placement,
    devices: Sequence[Device],
    options: Options,
    sharing: int = 1,
) -> tuple[ModelPart, ...]:
    """Return a model's parts, in the order in which its layers come to them.

    Args:
        shape: of the whole model.
        placement: where its weights are.
        devices: of each layer that attends.
        options: as the user gave them.
        sharing: processes of the model that share the CPU and its memory.

    Raises:
        OptionError: the user gave memory for another number of devices.
        UnsupportedModelError: several processes have layers on several devices each.
    """
    found: dict[Device, list[int]] = {}
    for layer_idx, device in enumerate(devices):
        found.setdefault(device, []).append(layer_idx)
    if sharing > 1 and len(found) > 1:
        raise UnsupportedModelError(
            f"each of {sharing} processes has layers on {len(found)} devices; give each one, "
            "or load the model in one process with device_map='auto'"
        )
    each = options.of_devices(len(found))
    whole = len(found) == 1
    parts = []
    for number, ((device, layers), own) in enumerate(zip(found.items(), each, strict=True), 1):
        part = ModelPart(
            device=device,
            layers=tuple(layers),
            shape=shape if whole else _part_of(shape, layers, number - 1),
            options=own,
            hardware=measured_hardware(device, sharing, own.disk_cache),
            label="" if whole else part_label(number, len(found), len(layers)),
        )
        parts.append(part)
    return tuple(_with_weights(part, parts, placement) for part in parts)


def _part_of(shape: ModelShape, layers: Sequence[int], stage: int) -> ModelShape:
    attending = shape.attention_layers
    own = tuple(attending[layer_idx] for layer_idx in layers)
    return dataclasses.replace(shape, layers=own, stage=stage)


def _with_weights(part: ModelPart, parts: Sequence[ModelPart], placement: Placement) -> ModelPart:
    """Return a part with the weights on its device; simulated ones divide what the CPU has."""
    where = part.device.torch_device
    there, brought = placement.weights_bytes.get(where, 0), placement.brought_bytes.get(where, 0)
    alike = [each for each in parts if each.device.torch_device == part.device.torch_device]
    layers = sum(len(each.layers) for each in alike)
    own = len(part.layers)
    shape = dataclasses.replace(
        part.shape,
        weights_bytes=there * own // layers,
        brought_bytes=brought * own // layers,
    )
    return dataclasses.replace(part, shape=shape)
