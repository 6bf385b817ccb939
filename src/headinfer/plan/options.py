"""The options of an attachment, each declared once.

`attach` has a keyword for each field, the command line a flag, and a benchmark records them all.
A field's name has its unit; the name that users write is without it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from headinfer.errors import OptionError
from headinfer.units import TooManyError, exact_bytes, parse_bytes, parse_tokens

DeviceName = Literal["auto", "cpu", "cuda", "simulated"]
DEVICE_NAMES: tuple[DeviceName, ...] = get_args(DeviceName)

FuseName = Literal["auto", "off"]
FUSE_NAMES: tuple[FuseName, ...] = get_args(FuseName)

TileSize = int | Literal["auto", "all"]


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


def _device(name: str, value: object) -> DeviceName:
    if value not in DEVICE_NAMES:
        raise OptionError(f"{name} must be one of {', '.join(DEVICE_NAMES)}, not {value!r}")
    return value


def _fuse(name: str, value: object) -> FuseName:
    if value not in FUSE_NAMES:
        raise OptionError(f"{name} must be 'auto' or 'off', not {value!r}")
    return value


def _bytes(name: str, value: str | int | None) -> int | None:
    return None if value is None or value == "auto" else parse_bytes(value, name)


def _parts(value: Any) -> Sequence[Any]:
    """Return the values of several devices that one was given as, in a list or with commas."""
    if isinstance(value, str):
        return value.split(",")
    return value if isinstance(value, list | tuple) else (value,)


def _counted(name: str, value: str | int, wanted: str) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    try:
        return parse_tokens(value)
    except TooManyError as error:
        raise OptionError(f"{name}: {error}") from None
    except OptionError:
        raise OptionError(f"{name} must be {wanted} or 'auto', not {value!r}") from None


def _tokens(name: str, value: str | int) -> int | Literal["auto"]:
    return _counted(name, value, "a positive integer")


def _tile_size(name: str, value: str | int, wanted: str = "a positive integer") -> TileSize:
    return "all" if value == "all" else _counted(name, value, f"{wanted}, 'all'")


def _is_zero(value: object) -> bool:
    return value == "0" or (isinstance(value, int) and not isinstance(value, bool) and value == 0)


def _tile_size_or_none(name: str, value: str | int) -> TileSize:
    return 0 if _is_zero(value) else _tile_size(name, value, "an integer from 0 on")


def _tokens_or_none(name: str, value: str | int) -> int | Literal["auto"]:
    return 0 if _is_zero(value) else _counted(name, value, "an integer from 0 on")


def _share(name: str, value: str | float) -> float | Literal["auto"]:
    return "auto" if value == "auto" else _part(name, value, "'off' or 'auto'")


def _part(name: str, value: str | float, other: str = "or 'off'") -> float:
    if value == "off":
        return 0.0
    try:
        share = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise OptionError(f"{name} must be a share from 0 to 1, {other}, not {value!r}")
    return share


def _pattern(name: str, value: object) -> str | None:
    if value is None or value == "auto":
        return None
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise OptionError(f"{name} must be a file, a folder or 'random', not {value!r}")
    return str(value)


def _switch(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{name} must be True or False, not {value!r}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """A set of validated options of one attachment; `Options.parse` makes it of what users write.

    Attributes:
        device: where attention is computed and what stands between it and the host store.
        device_memory_bytes: the most GPU memory for the model; None for no limit.
        host_memory_bytes: the most CPU memory for the KV caches; None for no limit.
        chunk_tokens: tokens that pass through the model at once in prefill.
        tile_heads: KV heads of one tile (the paper's head=8/4/2/1, section 3.2).
        tile_tokens: tokens of one tile; they bound the GPU memory's share of the KV cache.
        resident_tokens: the oldest tokens of each layer that are kept in GPU memory as well.
        draft_tokens: tokens of each layer that drafts attend, in copies in GPU memory; 0 where
            nothing is drafted.
        host_attention: share of the other tokens that the CPU attends in a decode step.
        overlap: whether copies run ahead of attention; off is the synchronous twin.
        capture: whether decode steps are captured and replayed, where they can be.
        fuse: whether decode steps in 16 bits use faster forms of norms, rotations and products.
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
            _device,
            "NAME",
            "cpu, cuda, simulated (a device on the CPU with memory of its own, which checks every "
            "copy) or auto: CUDA if there is one.",
        ),
    )
    device_memory_bytes: int | None = field(
        default=None,
        metadata=_declared(
            _bytes,
            "SIZE",
            "The most GPU memory for weights, KV, activations and CUDA itself, such as 24GiB, of "
            "each GPU, or 24GiB,16GiB; auto: what is free.",
        ),
    )
    host_memory_bytes: int | None = field(
        default=None,
        metadata=_declared(
            _bytes,
            "SIZE",
            "The most CPU memory for the KV cache, and for nothing else; auto: what is free.",
        ),
    )
    chunk_tokens: int | Literal["auto"] = field(
        default="auto",
        metadata=_declared(
            _tokens, "COUNT", "Prompt tokens that pass through the model at once, such as 4K."
        ),
    )
    tile_heads: TileSize = field(
        default="auto",
        metadata=_declared(_tile_size, "COUNT", "KV heads of one tile: a number, all or auto."),
    )
    tile_tokens: TileSize = field(
        default="auto",
        metadata=_declared(_tile_size, "COUNT", "Tokens of one tile: a count, all or auto."),
    )
    resident_tokens: TileSize = field(
        default="auto",
        metadata=_declared(
            _tile_size_or_none,
            "COUNT",
            "The oldest tokens to keep in GPU memory, so that they need not be fetched: a count, "
            "0, all, or auto for what fits.",
        ),
    )
    draft_tokens: int | Literal["auto"] = field(
        default=0,
        metadata=_declared(
            _tokens_or_none,
            "COUNT",
            "Tokens of each layer that drafts attend, in copies in GPU memory: a count, auto for "
            "an eighth of the context, or 0 for no drafts.",
        ),
    )
    host_attention: float | Literal["auto"] = field(
        default="auto",
        metadata=_declared(
            _share,
            "SHARE",
            "Share of the other tokens that the CPU attends in each decode step, from 0 to 1; off, "
            "or auto by the rates that headinfer probe measured, and then by who finishes first: "
            "only a number or off repeat results to the last bit.",
        ),
    )
    overlap: bool = field(
        default=True,
        metadata=_declared(
            _switch, "", "Fetch, wait and attend one tile at a time, to compare with."
        ),
    )
    capture: bool = field(
        default=True,
        metadata=_declared(_switch, "", "Launch decode steps kernel by kernel, to compare with."),
    )
    fuse: FuseName = field(
        default="auto",
        metadata=_declared(
            _fuse,
            "NAME",
            "Faster parts of decode steps in 16 bits: auto, or off for the model's own. On a GPU "
            "norms and rotary embeddings are compiled, in seconds the first time on a machine; on "
            "the CPU products read weights at the speed of memory.",
        ),
    )
    sparsity: float = field(
        default=0.0,
        metadata=_declared(
            _part,
            "SHARE",
            "Approximate: the share of KV heads that see their sinks and newest tokens alone, such "
            "as 0.5, chosen by --head-pattern; 0 for none.",
        ),
    )
    head_pattern: str | None = field(
        default=None,
        metadata=_declared(
            _pattern,
            "PATH",
            "Scores of KV heads: a file of headinfer heads, of KVzip or of retrieval heads, or a "
            "folder of DuoAttention; random (or random:SEED) to measure with.",
        ),
    )
    sink_tokens: int | Literal["auto"] = field(
        default="auto",
        metadata=_declared(
            _tokens_or_none,
            "COUNT",
            "The oldest tokens that streaming heads see; auto: the pattern's number, or 128.",
        ),
    )
    recent_tokens: int | Literal["auto"] = field(
        default="auto",
        metadata=_declared(
            _tokens,
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
            if name == "device_memory" and len(each := _parts(value)) > 1:
                values["device_memory_each"] = sizes = tuple(
                    parse_bytes(size, name) for size in each
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
            where = "one device" if count == 1 else f"{count} devices"
            raise OptionError(
                f"device_memory has {len(each)} values, but the layers of the model lie on "
                f"{where}; give one value, or one for each"
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
