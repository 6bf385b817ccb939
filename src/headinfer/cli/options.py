"""Command-line options that several verbs share, and their check before anything is loaded."""

import enum
import os
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from headinfer.plan.options import Options
from headinfer.units import parse_bytes

MEMORY_PANEL = "Memory and tiles"
MODEL_PANEL = "Model"
OUTPUT_PANEL = "Output"


class DeviceChoice(str, enum.Enum):
    """Where the model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    SIMULATED = "simulated"


class DtypeChoice(str, enum.Enum):
    """Number type of weights and cache."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


_THREADS_A_CORE = 4
"""The most that are of any use; with very many the libraries below end the process."""


def check_threads(count: int | None) -> int | None:
    """Refuse more threads than could be of use."""
    cores = os.cpu_count() or 1
    most = _THREADS_A_CORE * cores
    if count is not None and count > most:
        raise typer.BadParameter(
            f"{count} is more than {most}, {_THREADS_A_CORE} for each core that this machine shows"
        )
    return count


def check_seed(seed: int | None) -> int | None:
    """Refuse what torch's generators do not take."""
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise typer.BadParameter(f"{seed} is not from -2**63 to 2**64 - 1")
    return seed


NO_VALUE = ""
"""Metavar of flags: newer typer would print `<bool>` beside each."""


def _memory_option(flag: str, help_text: str, metavar: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=help_text, rich_help_panel=MEMORY_PANEL)


DeviceMemory = Annotated[
    str,
    _memory_option(
        "--device-memory",
        "The most to use on the device for weights, KV, activations and CUDA itself, such as "
        "24GiB; auto: what is free.",
        "SIZE",
    ),
]
HostMemory = Annotated[
    str,
    _memory_option(
        "--host-memory",
        "The most host memory for the KV cache, and for nothing else; auto: what is free.",
        "SIZE",
    ),
]
ChunkTokens = Annotated[
    str,
    _memory_option(
        "--chunk-tokens", "Prompt tokens that pass through the model at once, such as 4K.", "COUNT"
    ),
]
TileHeads = Annotated[
    str, _memory_option("--tile-heads", "KV heads of one tile: a number, all or auto.", "COUNT")
]
TileTokens = Annotated[
    str, _memory_option("--tile-tokens", "Tokens of one tile: a count, all or auto.", "COUNT")
]
ResidentTokens = Annotated[
    str,
    _memory_option(
        "--resident-tokens",
        "The oldest tokens to keep on the device, so that they need not be fetched: a count, 0, "
        "all, or auto for what fits.",
        "COUNT",
    ),
]
HostAttention = Annotated[
    str,
    _memory_option(
        "--host-attention",
        "Share of the other tokens that the CPU attends in each decode step, from 0 to 1; off, or "
        "auto by the rates that headinfer probe measured, and then by who finishes first: only a "
        "number or off repeat results to the last bit.",
        "SHARE",
    ),
]
NoOverlap = Annotated[
    bool,
    typer.Option(
        "--no-overlap",
        metavar=NO_VALUE,
        help="Fetch, wait and attend one tile at a time, to compare with.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
Device = Annotated[
    DeviceChoice,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, cuda, simulated (a device on the CPU with memory of its own, which checks "
        "every copy) or auto: CUDA if there is one.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        callback=check_threads,
        metavar="N",
        help="CPU threads for the model on the CPU and for the CPU's share; by default one a core.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Dtype = Annotated[
    DtypeChoice,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="float32, bfloat16, float16 or auto: as the model was saved.",
        rich_help_panel=MODEL_PANEL,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        metavar=NO_VALUE,
        help="Only text and errors.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        metavar=NO_VALUE,
        help="Also what transformers reports.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """The memory and tile options as the user wrote them, found to be well-formed.

    Attributes:
        device: as in `headinfer.attach`, but never "auto" once `on` was called; the rest likewise.
    """

    device: str
    device_memory: str
    host_memory: str
    chunk_tokens: str
    tile_heads: str
    tile_tokens: str
    overlap: bool
    resident_tokens: str = "auto"
    host_attention: str = "auto"

    def __post_init__(self) -> None:
        """Check all values.

        Raises:
            OptionError: a value does not parse or is out of range.
        """
        Options.parse(
            device=self.device,
            device_memory=self.device_memory,
            chunk_tokens=self.chunk_tokens,
            tile_heads=self.tile_heads,
            tile_tokens=self.tile_tokens,
            overlap=self.overlap,
            resident_tokens=self.resident_tokens,
            host_attention=self.host_attention,
        )
        if self.host_memory != "auto":
            parse_bytes(self.host_memory, "host_memory")

    def attach_keywords(self, device: str) -> dict[str, Any]:
        """Return keywords for `headinfer.attach` on a device that was chosen."""
        return {
            "device": device,
            "device_memory": self.device_memory,
            "host_memory": self.host_memory,
            "chunk_tokens": self.chunk_tokens,
            "tile_heads": self.tile_heads,
            "tile_tokens": self.tile_tokens,
            "overlap": self.overlap,
            "resident_tokens": self.resident_tokens,
            "host_attention": self.host_attention,
        }
