"""One cache's layers on several devices: an engine for those of each, behind one front.

Nothing is shared between the engines but the CPU: each has an arena, streams, tiles and a plan of
its own. What moves hidden states from device to device orders one device's compute after another's.
So an engine's work is in order with the model's, as on one device.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeAlias

import torch

from headinfer.engine.busy import BusyTimes
from headinfer.engine.engine import Engine
from headinfer.engine.parted_steps import CapturableParts
from headinfer.engine.readout import Part
from headinfer.plan.joining import joined
from headinfer.plan.plan import Plan
from headinfer.plan.shape import ModelShape

_Place = tuple[Engine, int]


class PartedEngine(CapturableParts):
    """A cache's attention layers on several devices; what `Engine` is on one.

    Layers are counted among all that attend. Each engine counts its own from 0.

    Args:
        shape: of the whole model.
        parts: an engine for each device.
        layers: which layers each of them has, in their order.
        busy: told where a prompt's chunks are.
    """

    def __init__(
        self,
        shape: ModelShape,
        parts: Sequence[Engine],
        layers: Sequence[Sequence[int]],
        busy: BusyTimes,
    ) -> None:
        super().__init__(parts, layers)
        self._busy = busy
        self._shape = shape
        places: dict[int, _Place] = {}
        for part, own in zip(parts, layers, strict=True):
            places.update({layer_idx: (part, at) for at, layer_idx in enumerate(own)})
        self._places = [places[layer_idx] for layer_idx in range(len(places))]
        self._joined: tuple[tuple[Plan, ...], Plan] | None = None

    @property
    def plan(self) -> Plan:
        """The plans of all devices as one; made anew only where one of them changed."""
        plans = tuple(part.plan for part in self.parts)
        known = self._joined
        if known is None or any(a is not b for a, b in zip(known[0], plans, strict=True)):
            known = self._joined = plans, joined(self._shape, plans)
        return known[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self.parts[0].dtype

    @property
    def closed(self) -> bool:
        """Whether any memory was given back: all of it goes then."""
        return any(part.closed for part in self.parts)

    @property
    def interrupted(self) -> bool:
        """Whether a change has begun and not ended, so that only closing is left to do."""
        return any(part.interrupted for part in self.parts)

    @property
    def half_done(self) -> bool:
        """Whether a change of all layers has begun and not ended."""
        return any(part.half_done for part in self.parts)

    @half_done.setter
    def half_done(self, half_done: bool) -> None:
        for part in self.parts:
            part.half_done = half_done

    @property
    def sends_late(self) -> bool:
        """Whether residents go home by `send_late`; see `Engine`."""
        return any(part.sends_late for part in self.parts)

    @sends_late.setter
    def sends_late(self, sends_late: bool) -> None:
        for part in self.parts:
            part.sends_late = sends_late

    def send_late(self) -> None:
        """Send residents home; see `Engine.send_late`."""
        self._on_all(Engine.send_late)

    @property
    def drafting(self) -> bool:
        """Whether the tokens that come are drafts."""
        return any(part.drafting for part in self.parts)

    def check_no_drafts(self) -> None:
        """Refuse what would read or change the cache between drafts."""
        for part in self.parts:
            part.check_no_drafts()

    def check_draft(self, batch: int, new_tokens: int) -> None:
        """Refuse a draft that there is no room for; see `Engine.check_draft`."""
        for part in self.parts:
            part.check_draft(batch, new_tokens)

    def begin_drafts(self) -> None:
        """Have all tokens that come be drafts; see `Engine.begin_drafts`."""
        for part in self.parts:
            with part.in_use():
                part.begin_drafts()

    def end_drafts(self) -> None:
        """Forget what was drafted; may be called again."""
        self._on_all(Engine.end_drafts)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Mark all layers as half done until the `with` statement ends well."""
        with contextlib.ExitStack() as changing:
            for part in self.parts:
                changing.enter_context(part.changing())
            yield

    @property
    def device_kv_bytes(self) -> int:
        """Bytes of device memory held for KV, on all devices together."""
        return sum(part.device_kv_bytes for part in self.parts)

    @property
    def taken_host_bytes(self) -> int:
        """Bytes of host memory held for KV, or promised to it."""
        return sum(part.taken_host_bytes for part in self.parts)

    @property
    def host_kv_bytes(self) -> int:
        """Bytes of host memory held for KV."""
        return sum(part.host_kv_bytes for part in self.parts)

    @property
    def unwritten_host_bytes(self) -> int:
        """Bytes of those that were never written."""
        return sum(part.unwritten_host_bytes for part in self.parts)

    @property
    def coming_host_bytes(self) -> int:
        """Bytes of host memory that were asked for and not taken yet."""
        return sum(part.coming_host_bytes for part in self.parts)

    @property
    def awaited_host_bytes(self) -> int:
        """Bytes of those that are still to be taken."""
        return sum(part.awaited_host_bytes for part in self.parts)

    def host_share_at(self, new_tokens: int) -> float:
        """Return the share that the host attends of the tokens beside the residents, in all layers.

        Args:
            new_tokens: of a pass.
        """
        weighed = [
            (part.host_share_at(new_tokens), part.plan.shape.kv_bytes(1)) for part in self.parts
        ]
        return sum(share * size for share, size in weighed) / (sum(w for _, w in weighed) or 1)

    def has_settled_at(self, new_tokens: int) -> bool:
        """Return whether the host's shares of passes of so many new tokens change seldom by now."""
        return all(part.has_settled_at(new_tokens) for part in self.parts)

    def torch_device(self, layer_idx: int) -> torch.device:
        """Return where a layer's tokens are attended."""
        part, at = self._places[layer_idx]
        return part.torch_device(at)

    def tokens(self, layer_idx: int) -> int:
        """Return the tokens a layer holds."""
        part, at = self._places[layer_idx]
        return part.tokens(at)

    def lengths(self) -> list[int]:
        """Return the tokens that each layer holds.

        Raises:
            CacheStateError: the cache was closed, or a change of it was interrupted.
        """
        lengths = {part: part.lengths() for part in self.parts}
        return [lengths[part][at] for part, at in self._places]

    def missing_bytes(self, tokens: int) -> int:
        """Return the bytes of host memory to be added for layers to hold `tokens` tokens."""
        return sum(part.missing_bytes(tokens) for part in self.parts)

    def expect(self, tokens: int) -> int:
        """State that layers will come to hold `tokens` tokens; see `Engine.expect`."""
        return sum([part.expect(tokens) for part in self.parts])

    def attend(self, layer_idx: int, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        """Attend a layer's new tokens where the layer is; see `Engine.attend`."""
        part, at = self._places[layer_idx]
        if tensors[0].shape[-2] > 1 and not part.is_capturing:
            self._busy.begin(part.device)
        with part.in_use():
            return part.attend(at, *tensors, **options)

    def append(self, layer_idx: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Keep a layer's tokens; see `Engine.append`."""
        part, at = self._places[layer_idx]
        with part.in_use():
            part.append(at, keys, values)

    def read_bytes(self, layer_idx: int, which: Part) -> int:
        """Return the bytes that `read` takes."""
        part, at = self._places[layer_idx]
        return part.read_bytes(at, which)

    def read(self, layer_idx: int, which: Part) -> torch.Tensor:
        """Return a copy of a layer's keys or values on its device; see `Engine.read`."""
        part, at = self._places[layer_idx]
        with part.in_use():
            return part.read(at, which)

    def settle_writes(self) -> None:
        """Wait for writes to the disk; see `Engine.settle_writes`."""
        self._on_all(Engine.settle_writes)

    def go_on(self) -> None:
        """Write to the disk anew what failed; see `Engine.go_on`."""
        self._on_all(Engine.go_on)

    def check_crop(self, layer_idx: int, tokens: int) -> None:
        """Refuse to remove a layer's newest tokens where its window has dropped the others."""
        part, at = self._places[layer_idx]
        part.check_crop(at, tokens)

    def crop(self, layer_idx: int, tokens: int) -> None:
        """Remove a layer's newest tokens; see `Engine.crop`."""
        part, at = self._places[layer_idx]
        with part.in_use():
            part.crop(at, tokens)

    def select(self, layer_idx: int, rows: Sequence[int]) -> None:
        """Rearrange a layer's rows; see `Engine.select`."""
        part, at = self._places[layer_idx]
        with part.in_use():
            part.select(at, rows)

    def select_all(self, rows: Sequence[int], plan: Plan) -> None:
        """Rearrange all rows, under a plan for as many; see `Engine.select_all`."""
        changed = False
        try:
            for part, own in zip(self.parts, plan.parts, strict=True):
                with part.in_use():
                    part.select_all(rows, own)
                changed = True
        except BaseException:
            if changed:
                self.half_done = True
            raise

    def replan(self, plan: Plan) -> None:
        """Go on under another plan for as many rows; see `Engine.replan`."""
        for part, own in zip(self.parts, plan.parts, strict=True):
            with part.in_use():
                part.replan(own)

    @property
    def parked(self) -> bool:
        """Whether any lacks its arena: none is attended before it is given a plan."""
        return any(part.parked for part in self.parts)

    def park(self) -> None:
        """Give up the arenas; see `Engine.park`."""
        self._on_all(Engine.park)

    def host_pieces(self) -> dict[Hashable, int]:
        """Return the bytes of each piece of host memory, by what copies have in common."""
        return {piece: size for part in self.parts for piece, size in part.host_pieces().items()}

    @property
    def earliest_crop(self) -> int:
        """The fewest tokens, but for none, that each layer can be cropped to."""
        return max(part.earliest_crop for part in self.parts)

    def compact(self) -> None:
        """Copy what is a small part of the memory it is in; see `Engine.compact`."""
        self._on_all(Engine.compact)

    def give_up_residents(self) -> None:
        """Keep no token on the devices."""
        self._on_all(Engine.give_up_residents)

    def check(self) -> None:
        """Raise what the host's attention failed with since the last check."""
        self._on_all(Engine.check)

    def clear(self) -> None:
        """Forget all tokens and free the host memory; the arenas stay.

        Raises:
            Exception: what the host's attention failed with, and nobody heard of; after all else.
        """
        self._on_all(Engine.clear)

    def close(self) -> None:
        """Free all memory; see `Engine.close`."""
        self._on_all(Engine.close)

    def _on_all(self, work: Callable[[Engine], None]) -> None:
        """Do something with each engine, also behind one where it raises."""
        with contextlib.ExitStack() as doing:
            for part in reversed(self.parts):
                doing.callback(_in_use, part, work)


def _in_use(part: Engine, work: Callable[[Engine], None]) -> None:
    with part.in_use():
        work(part)


CacheEngine: TypeAlias = Engine | PartedEngine
"""What is behind the layers of a cache: one engine, or one for each device."""
