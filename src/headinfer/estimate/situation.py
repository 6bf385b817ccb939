"""What a user asks about, and what is answered of one method."""

from dataclasses import dataclass, field, replace

from headinfer.errors import MemoryPlanError
from headinfer.estimate.accounting import Accounting, AccountingKind
from headinfer.estimate.below import Disk
from headinfer.plan import memory
from headinfer.plan.answering import in_answer, placement_with
from headinfer.plan.below_host import InBlocks
from headinfer.plan.form_choice import with_chosen_form
from headinfer.plan.format import Format
from headinfer.plan.hardware import Hardware
from headinfer.plan.host_room import HostRoom, machine_bytes_for
from headinfer.plan.options import Options
from headinfer.plan.plan import Plan
from headinfer.plan.resolve import least_plan, resolve
from headinfer.plan.shape import ModelShape
from headinfer.plan.step_time import Parts, Placement
from headinfer.plan.streaming import PAPERS_SPARSITY, evenly_streaming


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodPlan:
    """A plan of one method at one context on one machine.

    Attributes:
        method: its name; head-wise ones end in their heads.
        tile_heads: KV heads of a tile; None where nothing is offloaded.
        tile_tokens: tokens of a tile; None for all.
        chunk_tokens: tokens of a prefill chunk; None for the whole prompt at once.
        weights_bytes: on the device.
        kv_device_bytes: KV on the device, staging and windows included.
        activation_bytes: the most that activations take.
        runtime_bytes: what CUDA takes beside all that.
        kv_total_bytes: KV in all.
        kv_host_bytes: KV in host memory.
        max_context_tokens: the longest context that device and host memory hold; 0 where not even
            one token fits, None where memory sets no limit.
        prefill_s: predicted seconds of the prefill.
        decode_s_per_token: predicted seconds of a decode step behind the whole context.
        device_short_bytes: device memory it lacks here; 0 where it fits.
        host_short_bytes: host memory it lacks here; 0 where it fits.
        resident_bytes: KV that is not streamed while a prompt passes.
        answer_resident_bytes: KV that is not streamed in a decode step, as dense tokens take it.
        host_share: share of the rest that the CPU attends in a decode step.
        decode_parts: what the time of a decode step consists of.
        packed_share: bytes of a token in host memory, over those of it as it is computed.
        kv_disk_bytes: KV on a disk below host memory.
        disk_read_bytes: of that, what a decode step reads.
        disk_short_bytes: space on the disk that it lacks here; 0 where it fits.
        disk_block_tokens: tokens of a block above the disk; 0 where there is none.
        disk_host_blocks: blocks of a layer that host memory holds.
    """

    method: str
    tile_heads: int | None
    tile_tokens: int | None
    chunk_tokens: int | None
    weights_bytes: int
    kv_device_bytes: int
    activation_bytes: int
    runtime_bytes: int
    kv_total_bytes: int
    kv_host_bytes: int
    max_context_tokens: int | None
    prefill_s: float
    decode_s_per_token: float
    device_short_bytes: int
    host_short_bytes: int
    resident_bytes: int
    answer_resident_bytes: int
    host_share: float
    decode_parts: Parts
    packed_share: float = 1.0
    kv_disk_bytes: int = 0
    disk_read_bytes: int = 0
    disk_short_bytes: int = 0
    disk_block_tokens: int = 0
    disk_host_blocks: int = 0

    @property
    def total_device_bytes(self) -> int:
        """Weights, KV, activations and the runtime on the device."""
        used = self.weights_bytes + self.kv_device_bytes + self.activation_bytes
        return used + self.runtime_bytes

    @property
    def streamed_bytes(self) -> int:
        """KV that crosses the link in every decode step."""
        return self._beside_bytes - self.host_attended_bytes

    @property
    def host_attended_bytes(self) -> int:
        """KV that the CPU attends in every decode step."""
        return int(self.host_share * self._beside_bytes)

    @property
    def _beside_bytes(self) -> int:
        """KV that is not resident in a decode step, as it lies in host memory."""
        rest = self.kv_total_bytes - self.answer_resident_bytes if self.tile_heads else 0
        return int(self.packed_share * rest)

    @property
    def fits(self) -> bool:
        """Whether device, host memory and disk hold it."""
        return not (self.device_short_bytes or self.host_short_bytes or self.disk_short_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """A situation that a user asks about.

    Attributes:
        shape: the model.
        hardware: the machine, for its rates.
        context_tokens: prompt and answer together.
        device_memory_bytes: the most to use on the device.
        host_memory_bytes: the most to use of host memory, with all that `HostRoom` keeps back.
        batch: rows.
        kind: how bytes are counted.
        chunk_tokens: tokens of a prefill chunk, where a method has one; None to choose.
        machine_memory_bytes: where the CPU is the device and no memory was asked for, all of the
            machine's, which `device_memory_bytes` is what is left of; else None.
        streaming: for the method whose heads stream in part: the share of them, and what they see.
        host_format: of tokens in host memory under methods of ours; the paper's are dense.
        disk: below host memory under methods of ours; None for no disk.
        beside: what of the model other GPUs of the process have. Their tokens share host memory.
    """

    shape: ModelShape
    hardware: Hardware
    context_tokens: int
    device_memory_bytes: int
    host_memory_bytes: int
    batch: int = 1
    kind: AccountingKind = AccountingKind.OURS
    chunk_tokens: int | None = None
    machine_memory_bytes: int | None = None
    streaming: Options = field(default_factory=lambda: Options(sparsity=PAPERS_SPARSITY))
    host_format: Format = Format.DENSE
    disk: Disk | None = None
    beside: tuple[ModelShape, ...] = ()

    def of_ours(self) -> "Situation":
        """Return the situation of exact methods of ours: with packed tokens where they can be."""
        return self if self.host_format.code is not None else self.in_its_format()

    def in_its_format(self) -> "Situation":
        """Return the situation with tokens in the form asked for, where there is a link."""
        dense = self.host_format is Format.DENSE
        if dense or self.device == "cpu" or self.accounting.is_paper:
            return self
        return replace(self, shape=self.shape.stored_as(self.host_format))

    def sparse(self) -> "Situation":
        """Return the situation of a model of which some heads stream, as many in each layer."""
        return replace(self, shape=evenly_streaming(self.shape, self.streaming))

    @property
    def accounting(self) -> Accounting:
        """How bytes are counted here."""
        return Accounting(kind=self.kind, shape=self.shape, batch=self.batch, device=self.device)

    @property
    def options(self) -> Options:
        """What `attach` would be given: where the runtime is not counted, so much more."""
        uncounted = memory.runtime_bytes(self.device) - self.accounting.runtime_bytes
        return Options(
            device_memory_bytes=self.device_memory_bytes + uncounted,
            chunk_tokens=self.chunk_tokens or "auto",
        )

    @property
    def host_room_bytes(self) -> int:
        """The most KV in host memory; the paper keeps nothing back."""
        if self.accounting.is_paper:
            return self.host_memory_bytes
        return HostRoom.of_machine(self.host_memory_bytes, self.device).kv_bytes

    def host_short_bytes(self, kv_bytes: int) -> int:
        """Return the host memory that is lacking for so much KV there."""
        if kv_bytes <= self.host_room_bytes:
            return 0
        needed = kv_bytes if self.accounting.is_paper else machine_bytes_for(kv_bytes, self.device)
        return needed - self.host_memory_bytes

    @property
    def fixed_bytes(self) -> int:
        """What any method takes on the device, whatever the context: weights and runtime."""
        return self.shape.weights_bytes + self.accounting.runtime_bytes

    @property
    def device(self) -> str:
        """The kind of device: without a link the CPU attends tiles where they lie."""
        return "cpu" if self.hardware.link_bytes_per_s is None else "cuda"

    def in_chosen_format(self) -> "Situation":
        """Return the situation with tokens in the form that `attach` would choose here."""
        if self.disk is not None or self.accounting.is_paper:
            return self
        try:
            plan = with_chosen_form(self.shape, self.options, self.hardware, self._resolve)
        except MemoryPlanError:
            return self
        return replace(self, host_format=plan.shape.host_format)

    def resolve(self, *, keep_resident: bool) -> Plan:
        """Return the plan `attach` would make here; the smallest there is where none fits."""
        options = self.options if keep_resident else replace(self.options, resident_tokens=0)
        try:
            return self._resolve(self.shape, options)
        except MemoryPlanError:
            return self.least_plan()

    def _resolve(self, shape: ModelShape, options: Options) -> Plan:
        return resolve(
            shape,
            options,
            device=self.device,
            batch=self.batch,
            context_tokens=self.context_tokens,
            hardware=self.hardware,
            in_blocks=InBlocks(self.host_room_bytes if self.disk else None, self.beside),
        )

    def in_answer(self, plan: Plan) -> Plan:
        """Return the plan for a prompt's answer; the prompt's own where there is no other."""
        return in_answer(plan, self.options, self.hardware)

    def placement(self, plan: Plan) -> Placement:
        """Return what times depend on, with what is other in the answer."""
        return placement_with(plan, self.in_answer(plan))

    def least_plan(self) -> Plan:
        """Return the plan that takes the least device memory."""
        return least_plan(self.shape, self.options, device=self.device, batch=self.batch)
