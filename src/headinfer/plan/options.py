"""The options of an attachment, each declared once.

`attach` has a keyword for each field, the command line a flag, and a benchmark records them all.
A field's name has its unit; the name that users write is without it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from headinfer.errors import OptionError
from headinfer.plan.option_values import (
    DeviceName,
    FuseName,
    KVCacheName,
    TileSize,
    device_name,
    folder,
    fuse_name,
    kv_cache_name,
    part,
    parts,
    pattern,
    share,
    size,
    switch,
    tile_size,
    tile_size_or_none,
    token_count,
    token_count_or_none,
)
from headinfer.units import counted, exact_bytes, parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Declaration:
    """An option as users meet it.

    Attributes:
        parse: returns the field's value for what a user wrote, or refuses; given the option's name
            for the message. It takes its own results too.
        metavar: what stands for a value in a flag's help; empty for a switch.
        help: one line for users, with units.
        default: the field's, and that of `attach`.
        field: the field's name.
    """

    parse: Callable[[str, Any], Any]
    metavar: str
    help: str
    default: Any = None
    field: str = ""


def _declared(
    parse: Callable[[str, Any], Any], metavar: str, help_text: str
) -> dict[str, Declaration]:
    return {"declaration": Declaration(parse=parse, metavar=metavar, help=help_text)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A set of validated options of one attachment; `Options.parse` makes it of what users write.

    Attributes:
        device: where attention is computed and what stands between it and the host store.
        device_memory_bytes: the most GPU memory for the model; None for no limit.
        host_memory_bytes: the most CPU memory for the KV caches; None for no limit.
        disk_cache: a folder for the tokens that host memory has no room for; None for no disk.
        chunk_tokens: tokens that pass through the model at once in prefill.
        tile_heads: KV heads of one tile (the paper's head=8/4/2/1, section 3.2).
        tile_tokens: tokens of one tile; they bound the GPU memory's share of the KV cache.
        resident_tokens: the oldest tokens of each layer that are kept in GPU memory as well.
        draft_tokens: tokens of each layer that drafts attend, in copies in GPU memory; 0 where
            nothing is drafted.
        host_attention: share of the other tokens that the CPU attends in a decode step.
        kv_cache: the form of tokens in host memory; `packed` gives the same bits from fewer bytes,
            `int8` and `fp8` are approximate.
        overlap: whether copies run ahead of attention; off is the synchronous twin.
        capture: whether decode steps are captured and replayed, where they can be.
        fuse: whether models in 16 bits use faster forms of norms, rotations and products.
        sparsity: share of the KV heads that stream: they see sinks and a window alone. Approximate.
        head_pattern: where the scores are by which these heads are chosen; None for nowhere.
        sink_tokens: the oldest tokens, which streaming heads see; "auto" is the pattern's number.
        recent_tokens: the newest tokens that they see; "auto" is the pattern's number.
        device_memory_each: the most memory of each GPU, where several values were given; the least
            of them is `device_memory_bytes` then. No option by itself.
    """

    device: DeviceName = field(
        default="auto",
        metadata=_declared(
            device_name,
            "NAME",
            "cpu, cuda, simulated (a device on the CPU with memory of its own, which checks every "
            "copy) or auto: CUDA if there is one.",
        ),
    )
    device_memory_bytes: int | None = field(
        default=None,
        metadata=_declared(
            size,
            "SIZE",
            "The most GPU memory for weights, KV, activations and CUDA itself, such as 24GiB, of "
            "each GPU, or 24GiB,16GiB; auto: what is free.",
        ),
    )
    host_memory_bytes: int | None = field(
        default=None,
        metadata=_declared(
            size,
            "SIZE",
            "The most CPU memory for the KV cache, and for nothing else; auto: what is free.",
        ),
    )
    disk_cache: str | None = field(
        default=None,
        metadata=_declared(
            folder,
            "FOLDER",
            "A folder on a fast disk, for the oldest tokens that CPU memory has no room for; they "
            "lie in a file without a name, which goes with the process.",
        ),
    )
    chunk_tokens: int | Literal["auto"] = field(
        default="auto",
        metadata=_declared(
            token_count, "COUNT", "Prompt tokens that pass through the model at once, such as 4K."
        ),
    )
    tile_heads: TileSize = field(
        default="auto",
        metadata=_declared(tile_size, "COUNT", "KV heads of one tile: a number, all or auto."),
    )
    tile_tokens: TileSize = field(
        default="auto",
        metadata=_declared(tile_size, "COUNT", "Tokens of one tile: a count, all or auto."),
    )
    resident_tokens: TileSize = field(
        default="auto",
        metadata=_declared(
            tile_size_or_none,
            "COUNT",
            "The oldest tokens to keep in GPU memory, so that they need not be fetched: a count, "
            "0, all, or auto for what fits.",
        ),
    )
    draft_tokens: int | Literal["auto"] = field(
        default=0,
        metadata=_declared(
            token_count_or_none,
            "COUNT",
            "Tokens of each layer that drafts attend, in copies in GPU memory: a count, auto for "
            "an eighth of the context, or 0 for no drafts.",
        ),
    )
    host_attention: float | Literal["auto"] = field(
        default="auto",
        metadata=_declared(
            share,
            "SHARE",
            "Share of the other tokens that the CPU attends in each decode step, from 0 to 1; off, "
            "or auto by the rates that headinfer probe measured, and then by who finishes first: "
            "only a number or off repeat results to the last bit.",
        ),
    )
    kv_cache: KVCacheName = field(
        default="auto",
        metadata=_declared(
            kv_cache_name,
            "NAME",
            "How a GPU's KV cache lies in CPU memory: dense, packed (bfloat16 in three "
            "quarters of the bytes, every bit the same), int8 or fp8 (approximate: 8 bits a "
            "value), or auto: packed where decode steps gain by it, else dense.",
        ),
    )
    overlap: bool = field(
        default=True,
        metadata=_declared(
            switch, "", "Fetch, wait and attend one tile at a time, to compare with."
        ),
    )
    capture: bool = field(
        default=True,
        metadata=_declared(switch, "", "Launch decode steps kernel by kernel, to compare with."),
    )
    fuse: FuseName = field(
        default="auto",
        metadata=_declared(
            fuse_name,
            "NAME",
            "Faster parts of models in 16 bits: auto, or off for the model's own. On a GPU a "
            "prompt's norms take two launches, and a decode step's norms and rotary embeddings are "
            "compiled, in seconds the first time on a machine; on the CPU a decode step's products "
            "read weights at the speed of memory.",
        ),
    )
    sparsity: float = field(
        default=0.0,
        metadata=_declared(
            part,
            "SHARE",
            "Approximate: the share of KV heads that see their sinks and newest tokens alone, such "
            "as 0.5, chosen by --head-pattern; 0 for none.",
        ),
    )
    head_pattern: str | None = field(
        default=None,
        metadata=_declared(
            pattern,
            "PATH",
            "Scores of KV heads: a file of headinfer heads, of KVzip or of retrieval heads, or a "
            "folder of DuoAttention; random (or random:SEED) to measure with.",
        ),
    )
    sink_tokens: int | Literal["auto"] = field(
        default="auto",
        metadata=_declared(
            token_count_or_none,
            "COUNT",
            "The oldest tokens that streaming heads see; auto: the pattern's number, or 128.",
        ),
    )
    recent_tokens: int | Literal["auto"] = field(
        default="auto",
        metadata=_declared(
            token_count,
            "COUNT",
            "The newest tokens that streaming heads see; auto: the pattern's number, or 256.",
        ),
    )
    device_memory_each: tuple[int, ...] = ()

    @classmethod
    def parse(cls, **given: Any) -> "Options":
        """Return options of what users wrote, under the names that users write.

        Args:
            given: values by name; what is left out has its default.

        Raises:
            OptionError: there is no such option, or a value does not parse or is out of range.
        """
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name not in DECLARATIONS:
                known = ", ".join(DECLARATIONS)
                raise OptionError(f"there is no option {name!r}; the options are {known}")
            declared = DECLARATIONS[name]
            if name == "device_memory" and len(each := parts(value)) > 1:
                values["device_memory_each"] = sizes = tuple(
                    parse_bytes(each_size, name) for each_size in each
                )
                values[declared.field] = min(sizes)
                continue
            values[declared.field] = declared.parse(name, value)
        return cls(**values)

    def of_devices(self, count: int) -> tuple["Options", ...]:
        """Return the options of each of the devices that a model's layers lie on, in their order.

        Raises:
            OptionError: memory was given for another number of them.
        """
        each = self.device_memory_each
        if not each:
            return (self,) * count
        if len(each) != count:
            where = counted(count, "device")
            raise OptionError(
                f"device_memory has {counted(len(each), 'value')}, but the layers of the model lie "
                f"on {where}; give one value, or one for each"
            )
        return tuple(replace(self, device_memory_bytes=own, device_memory_each=()) for own in each)

    def keywords(self) -> dict[str, Any]:
        """Return all values as users write them: for `attach`, `Options.parse` and records."""
        written = {
            name: _written(getattr(self, declared.field), size=declared.metavar == "SIZE")
            for name, declared in DECLARATIONS.items()
        }
        if self.device_memory_each:
            written["device_memory"] = ",".join(map(exact_bytes, self.device_memory_each))
        return written


def _written(value: Any, *, size: bool) -> Any:
    if value is None:
        return "auto"
    return exact_bytes(value) if size else value


DECLARATIONS: dict[str, Declaration] = {
    each.name.removesuffix("_bytes"): replace(
        each.metadata["declaration"], default=each.default, field=each.name
    )
    for each in fields(Options)
    if each.metadata
}
"""The options by the names that users write, in the order of the fields."""
