"""A plan: the sizes of chunks and tiles that were chosen, and the bytes they take."""

from collections.abc import Iterator
from dataclasses import dataclass

from headinfer.plan import memory
from headinfer.plan.assistant import NO_ASSISTANT, AssistantBytes
from headinfer.plan.choices import ALL_TOKENS
from headinfer.plan.raw_room import RawRoom, begun_page_bytes, raw_room
from headinfer.plan.shape import LayerKind, ModelShape
from headinfer.plan.step_time import Placement, tokens_below
from headinfer.schedule.route import MAX_ASKED_TOKENS, Sizes
from headinfer.units import counted, counted_tokens, format_bytes, format_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A choice of sizes for one model, batch and expected context, and the bytes they take.

    Attributes:
        shape: the model.
        device: name of the device kind: "cpu", "cuda" or "simulated".
        overlap: whether copies run ahead of attention.
        batch: rows the plan is for (beams and returned sequences included).
        context_tokens: tokens expected in the cache; None until a prompt is known.
        chunk_tokens: tokens of one prefill chunk.
        tile_heads: KV heads of one tile.
        tile_tokens: tokens of one tile.
        page_tokens: tokens of one page of the decode tail.
        device_memory_bytes: the budget; None for no limit.
        staging_bytes: the buffers that tiles are fetched into.
        tail_bytes: the newest tokens of every offloaded layer.
        chunk_page_bytes: the pages a chunk is written back from.
        unpacked_bytes: the buffer that tiles which are packed on the host are unpacked into.
        packed_bytes: the pages that tokens are packed into before they are written back.
        window_bytes: the sliding-window layers' own caches.
        activation_bytes: estimate of one chunk's activations, or of a longer call's at once.
        runtime_bytes: what CUDA takes beside all that.
        assistant: what assistants take of the device, or of all devices together.
        resident_tokens: the oldest tokens of every offloaded layer, which stay on the device.
        resident_bytes: the bytes they take.
        draft_tokens: tokens of every offloaded layer that drafts attend, in copies on the device.
        draft_bytes: the bytes these take, with room for drafted tokens.
        host_share: share of the other tokens that the CPU attends in a decode step.
        verify_host_share: the same for `MAX_ASKED_TOKENS` new tokens at once; None where that is
            not known.
        host_share_adapts: whether that is where to begin, to be corrected by what is measured.
        host_unmeasured: whether it is 0 because nobody measured what the CPU reaches.
        host_left_out: whether it is 0 because steps up to `context_tokens` are sooner without it.
        disk_block_tokens: tokens of a block of host memory above a disk; 0 where there is none.
        disk_host_blocks: blocks of every offloaded layer in host memory; older ones are below.
        disk_buffers_bytes: the host memory that tokens on the disk are read to.
        disk_staging_bytes: the host memory of blocks that are being written to the disk.
        whole_tokens: tokens of the longest call that cannot pass in chunks; 0 for none.
        parts: the plan of each device where the layers lie on several; see `plan.joining`.
        prompt_plan: the plan to go back to for a prompt, if this is for its answer.
    """

    shape: ModelShape
    device: str
    overlap: bool
    batch: int
    context_tokens: int | None
    chunk_tokens: int
    tile_heads: int
    tile_tokens: int
    page_tokens: int
    device_memory_bytes: int | None
    staging_bytes: int
    tail_bytes: int
    chunk_page_bytes: int
    unpacked_bytes: int = 0
    packed_bytes: int = 0
    window_bytes: int
    activation_bytes: int
    runtime_bytes: int
    resident_tokens: int = 0
    resident_bytes: int = 0
    draft_tokens: int = 0
    draft_bytes: int = 0
    assistant: AssistantBytes = NO_ASSISTANT
    host_share: float = 0.0
    verify_host_share: float | None = None
    host_share_adapts: bool = False
    host_unmeasured: bool = False
    host_left_out: bool = False
    disk_block_tokens: int = 0
    disk_host_blocks: int = 0
    disk_buffers_bytes: int = 0
    disk_staging_bytes: int = 0
    whole_tokens: int = 0
    parts: tuple["Plan", ...] = ()
    prompt_plan: "Plan | None" = None

    @property
    def of_devices(self) -> tuple["Plan", ...]:
        """The plan of each device: this one where there is one device."""
        return self.parts or (self,)

    @property
    def arena_bytes(self) -> int:
        """Bytes of device memory the engine allocates, once, for offloaded KV."""
        if self.parts:
            return sum(part.arena_bytes for part in self.parts)
        pieces = self.staging_bytes + self.tail_bytes + self.chunk_page_bytes + self.resident_bytes
        pieces += self.unpacked_bytes + self.packed_bytes + self.draft_bytes
        return pieces and pieces + memory.ALIGNMENT_BYTES

    @property
    def kv_device_bytes(self) -> int:
        """All bytes of KV on the device: the arena and the sliding windows."""
        return self.arena_bytes + self.window_bytes

    @property
    def total_device_bytes(self) -> int:
        """Weights, KV, activations and the runtime on the device, and what assistants take."""
        used = self.shape.weights_bytes + self.kv_device_bytes + self.activation_bytes
        return used + self.runtime_bytes + self.assistant.total_bytes

    @property
    def fits(self) -> bool:
        """Whether all that is within the budget."""
        if self.parts:
            return all(part.fits for part in self.parts)
        budget = self.device_memory_bytes
        return budget is None or self.total_device_bytes <= budget

    def kv_host_bytes(self, tokens: int) -> int:
        """Bytes of host memory the store takes for `tokens` tokens in each row.

        It holds the resident ones too, so that they can be given up without a copy.
        """
        if self.parts:
            return sum(part.kv_host_bytes(tokens) for part in self.parts)
        if self.disk_block_tokens:
            tokens = min(tokens, self.disk_host_blocks * self.disk_block_tokens)
            held = memory.blocks_bytes(self.shape, tokens, self.disk_block_tokens, self.batch)
            moving = self.disk_buffers_bytes + self.disk_staging_bytes
            return held + moving + self.raw_page_bytes
        return self.shape.host_kv_bytes(tokens, self.batch) + self.raw_page_bytes

    def disk_tokens(self, tokens: int) -> int:
        """Tokens of `tokens` in each layer's rows that lie on the disk, once all were sent home.

        Where there are several devices, it is the most that any has there.
        """
        if self.parts:
            return max(part.disk_tokens(tokens) for part in self.parts)
        return tokens_below(tokens, self.disk_block_tokens, self.disk_host_blocks)

    def disk_bytes(self, tokens: int) -> int:
        """Bytes that blocks on the disk take of `tokens` tokens in each row."""
        if self.parts:
            return sum(part.disk_bytes(tokens) for part in self.parts)
        if not self.disk_block_tokens:
            return 0
        below = self.disk_tokens(tokens)
        return memory.blocks_bytes(self.shape, below, self.disk_block_tokens, self.batch)

    @property
    def ranks_differ(self) -> bool:
        """Whether ranks may lack host memory at different times: all of them look, or none."""
        return self.shape.uneven or (self.shape.ranks > 1 and self.disk_block_tokens > 0)

    @property
    def raw_page_bytes(self) -> int:
        """Bytes of host memory set aside for pages that do not pack."""
        if self.parts:
            return sum(part.raw_page_bytes for part in self.parts)
        if not self.shape.packs:
            return 0
        return self.raw_room.num_bytes + begun_page_bytes(self.shape, batch=self.batch)

    @property
    def raw_room(self) -> RawRoom:
        """Most of them: for the full pages of a prompt's chunks, on one device."""
        return raw_room(
            self.shape,
            chunk_tokens=(self.prompt_plan or self).chunk_tokens,  # an answer's need fewer slots
            batch=self.batch,
            context_tokens=self.context_tokens,
        )

    def streamed_bytes(self, tokens: int) -> int:
        """Bytes in host memory of `tokens` tokens in each row that are not resident."""
        if self.parts:
            return sum(part.streamed_bytes(tokens) for part in self.parts)
        return self.shape.host_kv_bytes(max(tokens - self.resident_tokens, 0), self.batch)

    @property
    def sizes(self) -> Sizes:
        """What the steps of a pass depend on."""
        return Sizes(self.tile_heads, self.tile_tokens, self.page_tokens, self.device == "cpu")

    @property
    def placement(self) -> Placement:
        """What the plan does with the KV cache, to predict its times."""
        parts = self.of_devices
        resident = sum(part.shape.kv_bytes(part.resident_tokens, part.batch) for part in parts)
        tile_tokens = min(self.tile_tokens, self.disk_block_tokens or self.tile_tokens)
        all_resident = 0 < (self.context_tokens or 0) <= self.resident_tokens
        return Placement(
            batch=self.batch,
            chunk_tokens=self.chunk_tokens,
            tile_heads=self.tile_heads,
            tile_tokens=None if all_resident else tile_tokens,
            resident_bytes=resident,
            host_share=self.host_share,
            overlap=self.overlap,
            disk_block_tokens=self.disk_block_tokens,
            disk_host_blocks=self.disk_host_blocks,
        )

    def host_share_at(self, new_tokens: int) -> float:
        """Return the share that the CPU attends for some new tokens at once.

        Its time for a token grows evenly with them, from a decode step's to the most there can be.
        """
        one, most = self.host_share, self.verify_host_share
        if new_tokens == 1 or not one or not most:
            return one
        part = (new_tokens - 1) / (MAX_ASKED_TOKENS - 1)
        return 1 / ((1 - part) / one + part / most)

    def lines(self) -> Iterator[str]:
        """Yield the plan as a few lines for people."""
        yield from self._sizes_lines()
        if self.approximation:
            yield f"approximate: {self.approximation}"
        for number, part in enumerate(self.parts, 1):
            of = part_label(number, len(self.parts), len(part.shape.attention_layers))
            yield from (of + line for line in part._memory_lines())
        if not self.parts:
            yield from self._memory_lines()
        if self.context_tokens is not None:
            yield (
                f"CPU memory for the KV cache of {counted_tokens(self.context_tokens)}"
                f"{f', {self.shape.host_format.value}' if self.shape.packs else ''}: "
                f"{format_bytes(self.kv_host_bytes(self.context_tokens))}"
            )
            if below := self.disk_tokens(self.context_tokens):
                size = format_bytes(self.disk_bytes(self.context_tokens))
                yield f"the oldest {counted_tokens(below)} on disk: {size}"

    def _sizes_lines(self) -> Iterator[str]:
        """Yield what passes at once."""
        all_at_once = self.tile_tokens >= ALL_TOKENS
        tokens = "all tokens" if all_at_once else counted_tokens(self.tile_tokens)
        heads = counted(self.tile_heads, "KV head")
        how = "copies overlap attention" if self.overlap else "synchronous copies"
        chunks = f"chunks of {counted_tokens(self.chunk_tokens)}"
        if self.device == "cpu":  # attends the cache where it lies: tiles and copies say nothing
            yield f"prompts pass in {chunks}"
        else:
            yield f"tiles of {heads} x {tokens}, {chunks}; {how}"
        if self.whole_tokens:
            yield f"up to {counted_tokens(self.whole_tokens)} that cannot pass in chunks"
        if self.shape.ranks > 1:
            own_heads = max((layer.kv_heads for layer in self.shape.layers), default=0)
            yield f"one of {self.shape.ranks} ranks, with KV heads of a layer: {own_heads}"

    def _memory_lines(self) -> Iterator[str]:
        """Yield what a device holds, and what the CPU attends for it."""
        budget = self.device_memory_bytes
        runtime = f", CUDA itself {format_bytes(self.runtime_bytes)}" if self.runtime_bytes else ""
        kv = "" if self.device == "cpu" else f"KV {format_bytes(self.kv_device_bytes)}, "
        helper = self.assistant
        assistant = f", an assistant {format_bytes(helper.total_bytes)}" * bool(helper.total_bytes)
        where = {"cpu": "CPU", "cuda": "GPU"}.get(self.device, f"{self.device} GPU")
        yield (
            f"{where} memory {format_bytes(self.total_device_bytes)}"
            f"{f' of {format_bytes(budget)}' if budget else ''}: "
            f"weights {format_bytes(self.shape.weights_bytes)}, {kv}"
            f"activations {format_bytes(self.activation_bytes)} (estimate){runtime}{assistant}"
        )
        if helper.total_bytes:
            yield (
                f"the assistant: weights {format_bytes(helper.weights_bytes)}, KV and activations "
                f"{format_bytes(helper.working_bytes)} (estimate)"
            )
        if self.shape.brought_bytes:
            yield (
                f"{format_bytes(self.shape.brought_bytes)} of weights lie elsewhere, and are "
                "brought for each token, and for each chunk of a prompt"
            )
        if self.resident_tokens:
            yield (
                f"the oldest {counted_tokens(self.resident_tokens)} "
                f"{'stays' if self.resident_tokens == 1 else 'stay'} in GPU memory: "
                f"{format_bytes(self.resident_bytes)}"
            )
        if self.draft_tokens:
            yield (
                f"drafts attend {counted_tokens(self.draft_tokens)} of each layer, copied: "
                f"{format_bytes(self.draft_bytes)}"
            )
        if self.host_share:
            yield f"the CPU attends {self.host_share:.0%} of the other tokens in a decode step"
        elif self.host_unmeasured and self.streamed_bytes(self.context_tokens or 0):
            yield "the CPU attends none of the other tokens until `headinfer probe` has timed it"

    @property
    def approximation(self) -> str:
        """What keeps results from being exact, in words; empty for nothing."""
        return "; ".join(filter(None, [self._rounding(), self._streaming()]))

    @property
    def rounds(self) -> bool:
        """Whether tokens in host memory are not what was computed."""
        return self.shape.host_format.code is not None

    def _rounding(self) -> str:
        if not self.rounds:
            return ""
        return (
            f"keys and values in CPU memory are rounded to 8 bits ({self.shape.host_format.value})"
        )

    def _streaming(self) -> str:
        if self.shape.exact is self.shape:
            return ""
        streaming = [layer.streaming for layer in self.shape.layers if layer.streaming is not None]
        heads = sum(len(each.heads) for each in streaming)
        full = [layer.kv_heads for layer in self.shape.layers if layer.kind is LayerKind.FULL]
        sinks, recent = streaming[0].sink_tokens, streaming[0].recent_tokens
        return (
            f"{heads} of {counted(sum(full), 'KV head')} see the first {format_tokens(sinks)} and "
            f"the newest {counted_tokens(recent)} alone"
        )

    def __str__(self) -> str:
        """Return `lines`, one below the other."""
        return "\n".join(self.lines())


def part_label(number: int, count: int, layers: int) -> str:
    """Return what stands before a line about one of several devices.

    Args:
        number: of the device, from 1 on.
        count: of the devices.
        layers: that attend there.
    """
    return f"device {number} of {count}, {layers} {'layer' if layers == 1 else 'layers'}: "
