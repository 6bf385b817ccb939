"""`headinfer bench`: speed and memory against stock transformers, checked and bounded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.status import Status as Spinner

from headinfer.bench.document import document
from headinfer.bench.methods import METHODS
from headinfer.bench.result import Status
from headinfer.bench.rows import Row
from headinfer.bench.spec import BenchSpec, Command, ModelSpec, Settings
from headinfer.bench.suite import FreshProcesses, Launcher, run_suite
from headinfer.bench.table import render
from headinfer.cli.console import reporting_errors
from headinfer.cli.options import (
    ChunkTokens,
    Device,
    DeviceChoice,
    DeviceMemory,
    TileHeads,
    TileTokens,
)
from headinfer.cli.output import STDOUT, JsonCommand, JsonPath, check_writable, write_json
from headinfer.errors import OptionError
from headinfer.units import parse_tokens

app = typer.Typer(
    help="Measure speed and memory against stock transformers, on this machine.",
    no_args_is_help=True,
)

_WIDTH = 100
"""Columns where stderr is not a terminal."""


def make_launcher() -> Launcher:
    """Return what runs the trials."""
    return FreshProcesses()


_MODEL = "Model (random weights)"

Context = Annotated[str, typer.Option(help="Tokens of the prompt, for example 32K.")]
Methods = Annotated[str, typer.Option(help=f"Comma-separated, of: {', '.join(METHODS)}.")]
NewTokens = Annotated[int, typer.Option(help="Decode steps timed after each prefill.")]
Repeats = Annotated[int, typer.Option(help="Fresh processes for each method.")]
Seed = Annotated[int, typer.Option(help="Seed of weights and tokens.")]
Dtype = Annotated[str, typer.Option(help="bfloat16, float16 or float32.", rich_help_panel=_MODEL)]
Layers = Annotated[int, typer.Option(help="Decoder layers.", rich_help_panel=_MODEL)]
HiddenSize = Annotated[int, typer.Option(help="Hidden width.", rich_help_panel=_MODEL)]
Heads = Annotated[int, typer.Option(help="Query heads.", rich_help_panel=_MODEL)]
KvHeads = Annotated[int, typer.Option(help="KV heads.", rich_help_panel=_MODEL)]
HeadDim = Annotated[int, typer.Option(help="Elements of a head.", rich_help_panel=_MODEL)]
IntermediateSize = Annotated[
    int | None,
    typer.Option(help="Width of the MLP.", show_default="4 x hidden", rich_help_panel=_MODEL),
]
VocabSize = Annotated[int, typer.Option(help="Vocabulary.", rich_help_panel=_MODEL)]


@app.command(cls=JsonCommand)
def decode(
    context: Context = "32K",
    methods: Methods = "standard,headinfer",
    new_tokens: NewTokens = 8,
    repeats: Repeats = 1,
    seed: Seed = 0,
    json_path: JsonPath = None,
    dtype: Dtype = "bfloat16",
    layers: Layers = 4,
    hidden_size: HiddenSize = 512,
    heads: Heads = 16,
    kv_heads: KvHeads = 4,
    head_dim: HeadDim = 128,
    intermediate_size: IntermediateSize = None,
    vocab_size: VocabSize = 4096,
    device: Device = DeviceChoice.AUTO,
    device_memory: DeviceMemory = "auto",
    chunk_tokens: ChunkTokens = "auto",
    tile_heads: TileHeads = "auto",
    tile_tokens: TileTokens = "auto",
) -> None:
    """Time decode steps on a cache filled by a real prefill.

    Exit code 1 when a result is wrong or nothing could be measured.
    """
    with reporting_errors():
        _run(Command.DECODE, **locals())


@app.command(cls=JsonCommand)
def prefill(
    context: Context = "32K",
    methods: Methods = "standard,headinfer",
    repeats: Repeats = 1,
    seed: Seed = 0,
    json_path: JsonPath = None,
    dtype: Dtype = "bfloat16",
    layers: Layers = 4,
    hidden_size: HiddenSize = 512,
    heads: Heads = 16,
    kv_heads: KvHeads = 4,
    head_dim: HeadDim = 128,
    intermediate_size: IntermediateSize = None,
    vocab_size: VocabSize = 4096,
    device: Device = DeviceChoice.AUTO,
    device_memory: DeviceMemory = "auto",
    chunk_tokens: ChunkTokens = "auto",
    tile_heads: TileHeads = "auto",
    tile_tokens: TileTokens = "auto",
) -> None:
    """Time the prefill of a prompt, and one decode step to see that the cache works.

    Exit code 1 when a result is wrong or nothing could be measured.
    """
    with reporting_errors():
        _run(Command.PREFILL, new_tokens=1, **locals())


def _run(command: Command, **options: Any) -> None:
    json_path: str | None = options.pop("json_path")
    spec = _spec(command, options)
    check_writable("--json", json_path)
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = _WIDTH
    launcher = make_launcher()
    rows: list[Row] = []
    with _progress(console) as progress:
        progress.started("measuring the machine")
        machine = launcher.machine(spec.settings.device, spec.dtype)
        rows.extend(run_suite(spec, launcher, machine, progress))
    console.print(render(spec, machine, rows))
    if json_path is not None:
        write_json(json_path, document(spec, machine, rows))
        if json_path != STDOUT:
            console.print(f"written to {json_path}")
    raise typer.Exit(exit_code(rows))


def exit_code(rows: list[Row]) -> int:
    """Return 0 when all that ran was right, and something ran; otherwise 1."""
    statuses = {row.status for row in rows}
    return 0 if Status.OK in statuses and statuses <= {Status.OK, Status.CANNOT_RUN} else 1


def _spec(command: Command, options: dict[str, Any]) -> BenchSpec:
    """Return the options of a command as what is to be measured.

    Raises:
        OptionError: an option does not parse or is out of range.
    """
    methods = tuple(name.strip() for name in options["methods"].split(",") if name.strip())
    for name in methods:
        if name not in METHODS:
            raise OptionError(f"there is no method {name!r}; choose among {', '.join(METHODS)}")
    hidden_size = options["hidden_size"]
    intermediate_size = options["intermediate_size"]
    return BenchSpec(
        command=command,
        methods=methods,
        contexts=(parse_tokens(options["context"]),),
        new_tokens=options["new_tokens"],
        repeats=options["repeats"],
        dtype=options["dtype"],
        seed=options["seed"],
        model=ModelSpec(
            layers=options["layers"],
            hidden_size=hidden_size,
            heads=options["heads"],
            kv_heads=options["kv_heads"],
            head_dim=options["head_dim"],
            intermediate_size=4 * hidden_size if intermediate_size is None else intermediate_size,
            vocab_size=options["vocab_size"],
        ),
        settings=Settings(
            device=options["device"].value,
            device_memory=options["device_memory"],
            chunk_tokens=options["chunk_tokens"],
            tile_heads=options["tile_heads"],
            tile_tokens=options["tile_tokens"],
        ),
    )


class _ConsoleProgress:
    """A spinner for what runs, and a line for what is finished."""

    def __init__(self, console: Console, spinner: Spinner) -> None:
        self._console = console
        self._spinner = spinner

    def started(self, what: str) -> None:
        """Show what runs."""
        self._spinner.update(what)

    def finished(self, what: str, outcome: str) -> None:
        """Print how it ended."""
        self._console.print(f"{what}: {outcome}", style="dim", markup=False, highlight=False)


@contextmanager
def _progress(console: Console) -> Iterator[_ConsoleProgress]:
    with console.status("") as spinner:
        yield _ConsoleProgress(console, spinner)
