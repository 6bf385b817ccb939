"""What `headinfer plan` is asked: of which machines and GPUs, and of each of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from headinfer.cli.options import DtypeChoice
from headinfer.disk.mount import free_bytes, mount_of
from headinfer.errors import OptionError
from headinfer.estimate.accounting import AccountingKind
from headinfer.estimate.below import Disk
from headinfer.estimate.machines import HARDWARE
from headinfer.estimate.situation import Situation
from headinfer.plan.format import Format
from headinfer.plan.hardware import Hardware
from headinfer.plan.host_room import HostRoom
from headinfer.plan.measured import read_measurement
from headinfer.plan.options import Options
from headinfer.plan.shape import ModelShape
from headinfer.plan.streaming import PAPERS_SPARSITY

ALL = "all"
"""Stands for all machines known by name."""

_MOST_GPUS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question, which is the same for each machine.

    Attributes:
        shape: of the model.
        context_tokens: prompt and answer together.
        batch: rows.
        options: with the memory to use, and the form of tokens.
        accounting: how bytes are counted.
        host_format: of tokens in host memory; None for what `attach` chooses on each machine.
    """

    shape: ModelShape
    context_tokens: int
    batch: int
    options: Options
    accounting: AccountingKind
    host_format: Format | None

    def on(self, here: Hardware) -> Situation:
        """Return the situation on a machine.

        Raises:
            OptionError: an option means nothing there.
        """
        options, disk = self.options, None
        if options.disk_cache is not None:
            here, disk = _above_disk(here, options, self.accounting)
        one_memory = here.link_bytes_per_s is None
        if one_memory and options.host_memory_bytes is not None:
            raise OptionError("there is one memory on a CPU: use --device-memory")
        situation = Situation(
            shape=self.shape,
            hardware=here,
            context_tokens=self.context_tokens,
            device_memory_bytes=_device_memory_bytes(here, options.device_memory_bytes),
            host_memory_bytes=options.host_memory_bytes or here.host_memory_bytes,
            batch=self.batch,
            kind=self.accounting,
            chunk_tokens=None if options.chunk_tokens == "auto" else options.chunk_tokens,
            streaming=_streaming(options),
            host_format=self.host_format or Format.DENSE,
            disk=disk,
            machine_memory_bytes=here.device_memory_bytes
            if one_memory and options.device_memory_bytes is None
            else None,
        )
        return situation if self.host_format else situation.in_chosen_format()


def host_format_of(
    options: Options,
    model: str,
    dtype: DtypeChoice,
    accounting: AccountingKind,
    counts: Sequence[int],
) -> Format | None:
    """Return the form of tokens in host memory; None where `attach` chooses it on each machine.

    Args:
        options: what the user set.
        model: its name.
        dtype: of it.
        accounting: how bytes are counted.
        counts: of GPUs that are planned for; on several of them `attach` leaves tokens dense.

    Raises:
        OptionError: the accounting knows dense ones alone; or they are to be packed, and of another
            dtype than bfloat16.
    """
    if options.kv_cache == "auto":
        named = _dtype_name(model, dtype)
        chooses = named == "bfloat16" and max(counts, default=1) == 1
        return None if chooses and accounting is AccountingKind.OURS else Format.DENSE
    form = Format(options.kv_cache)
    if form is not Format.DENSE and accounting is not AccountingKind.OURS:
        raise OptionError(
            f"--accounting {accounting.value} counts dense KV alone; leave out --kv-cache"
        )
    if form is not Format.PACKED or (named := _dtype_name(model, dtype)) == "bfloat16":
        return form
    if dtype is DtypeChoice.AUTO:
        raise OptionError(
            f"--kv-cache packed is for bfloat16 alone, and the config of {model!r} names {named}; "
            "leave out --kv-cache, or give --dtype bfloat16"
        )
    raise OptionError(
        f"--kv-cache packed is for bfloat16 alone, not {named}; leave out one of the two"
    )


def _dtype_name(model: str, dtype: DtypeChoice) -> str:
    """Return the name of the dtype that a model is planned in."""
    if dtype is not DtypeChoice.AUTO:
        return str(dtype.value)
    from headinfer.cli.shapes import dtype_of

    return dtype_of(model)


def _above_disk(
    here: Hardware, options: Options, accounting: AccountingKind
) -> tuple[Hardware, Disk]:
    """Return a machine with the rates of the disk that a folder is on, and that disk.

    Raises:
        OptionError: nothing can lie below host memory here.
    """
    folder = options.disk_cache or ""
    if here.link_bytes_per_s is None:
        raise OptionError("--disk-cache is below a GPU's CPU memory; leave it out on a CPU")
    if accounting is not AccountingKind.OURS:
        raise OptionError(f"--accounting {accounting.value} knows no disk; leave out --disk-cache")
    mount = mount_of(folder)
    disk = Disk(folder=folder, said=mount.said, free_bytes=free_bytes(folder))
    measurement = read_measurement()
    rate = None if measurement is None else measurement.disk_rate(mount.disk)
    return here.above_disk(rate), disk


def _streaming(options: Options) -> Options:
    """Return what the row of streaming heads is for: half of them unless a share was given."""
    return Options(
        sparsity=options.sparsity or PAPERS_SPARSITY,
        sink_tokens=options.sink_tokens,
        recent_tokens=options.recent_tokens,
    )


def _device_memory_bytes(here: Hardware, asked: int | None) -> int:
    """Return the memory for weights, KV and activations; on a CPU not all there is."""
    if asked is not None:
        return asked
    if here.link_bytes_per_s is None:
        return HostRoom.of_machine(here.device_memory_bytes, "cpu").kv_bytes
    return here.device_memory_bytes


def parse_machines(text: str | None) -> list[str | None]:
    """Return machines by name, separated by commas; one that is None where none was named.

    Raises:
        OptionError: there is a comma too many.
    """
    if text is None or "," not in text:
        return [*HARDWARE] if text == ALL else [text]
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise OptionError(
            f"--hardware {text!r} has a comma too many; write for example rtx-4090,h100-80gb"
        )
    each = [[*HARDWARE] if name == ALL else [name] for name in names]
    return list(dict.fromkeys(name for some in each for name in some))


def parse_counts(text: str | None) -> list[int]:
    """Return numbers of GPUs, separated by commas; empty where none was given.

    Raises:
        OptionError: one is none.
    """
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= _MOST_GPUS for part in parts):
        raise OptionError(
            f"--gpus must be a number from 1 to {_MOST_GPUS}, or several such as 1,2,4, not "
            f"{text!r}"
        )
    return list(dict.fromkeys(map(int, parts)))


def check_alike(
    machines: Sequence[Hardware],
    counts: Sequence[int],
    options: Options,
    accounting: AccountingKind,
    *,
    steps: bool,
) -> None:
    """Refuse what a plan for so many machines and GPUs does not take into account.

    Raises:
        OptionError: names it.
    """
    if counts:
        for hardware in machines:
            _check_gpus(hardware, options, accounting, steps=steps)
    elif options.device_memory_each:
        raise OptionError("the plan is for one GPU: give one value as --device-memory, or --gpus")
    if steps and len(machines) > 1:
        raise OptionError("--steps are of one machine; name one as --hardware")


def _check_gpus(
    hardware: Hardware, options: Options, accounting: AccountingKind, *, steps: bool
) -> None:
    """Refuse what a plan for several GPUs does not take into account.

    Raises:
        OptionError: names it.
    """
    if hardware.link_bytes_per_s is None:
        raise OptionError(
            "--gpus is for machines with a GPU, and this one was measured without; name one as "
            "--hardware"
        )
    if accounting is not AccountingKind.OURS:
        raise OptionError("--gpus counts by our accounting alone; leave out --accounting")
    if options.sparsity:
        raise OptionError("--gpus plans for exact attention alone; leave out --sparsity")
    if steps:
        raise OptionError("--steps are of one GPU; leave out --gpus")
