"""Command-line flags that several verbs share, those of `attach`'s options among them."""

import enum
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from headinfer.disk.folder import check_folder
from headinfer.plan.options import DECLARATIONS, Options

PROMPT_PANEL = "Prompt"
MODEL_PANEL = "Model"
GENERATION_PANEL = "Generation (defaults: the model's own)"
OUTPUT_PANEL = "Output"
MEMORY_PANEL = "Memory"
RESEARCH_PANEL = "Research: tiles, shares and switches, to measure with"

_PANELS = {
    "device": MODEL_PANEL,
    "device_memory": MEMORY_PANEL,
    "host_memory": MEMORY_PANEL,
    "disk_cache": MEMORY_PANEL,
    "kv_cache": MEMORY_PANEL,
    "chunk_tokens": MEMORY_PANEL,
}
"""Panels of the options that everybody may need; the others are for research."""


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
            f"it must be at most {most}, {_THREADS_A_CORE} for each core that this machine shows"
        )
    return count


def check_seed(seed: int | None) -> int | None:
    """Refuse what torch's generators do not take."""
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise typer.BadParameter("it must be from -2**63 to 2**64 - 1")
    return seed


NO_VALUE = ""
"""Metavar of flags: newer typer would print `<bool>` beside each."""


_FOR_NONE = ("disk_cache", "head_pattern")
"""Options that are off without a value, which "auto" would not say."""


def flag_of(name: str) -> str:
    """Return the flag of an argument of Python."""
    return f"--{name.replace('_', '-')}"


def _flag(name: str, help_text: str) -> inspect.Parameter:
    """Return the flag of an option as a parameter of a verb."""
    declared = DECLARATIONS[name]
    panel = _PANELS.get(name, RESEARCH_PANEL)
    switch = declared.default is True
    if switch:
        name = f"no_{name}"
    flag = typer.Option(
        flag_of(name),
        metavar=declared.metavar,  # empty for a switch, as `NO_VALUE`
        help=help_text or declared.help,
        rich_help_panel=panel,
        show_default=name not in _FOR_NONE,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[bool if switch else str, flag],
        default=False if switch else _written(declared.default),
    )


def _written(default: object) -> str:
    """Return a default as users write it."""
    if default is None:
        return "auto"
    return f"{default:g}" if isinstance(default, float) else str(default)


def with_flags(*names: str, **help_texts: str) -> Callable[[Callable[..., None]], Any]:
    """Give a verb a flag for each option, in the place of its parameter `flags`.

    The verb is given `flags`: what the user wrote, by option, for `Options.parse`.

    Args:
        names: of the options; all of them by default.
        help_texts: for options that mean something else to this verb.
    """

    def decorate(verb: Callable[..., None]) -> Callable[..., None]:
        wanted = [_flag(name, help_texts.get(name, "")) for name in names or DECLARATIONS]
        signature = inspect.signature(verb)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name == "flags":
                parameters += wanted
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

        @functools.wraps(verb)
        def run(**given: Any) -> None:
            verb(flags=take_flags(given, names), **given)

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {part.name: part.annotation for part in parameters}
        return run

    return decorate


def take_flags(given: dict[str, Any], names: Sequence[str] = ()) -> dict[str, Any]:
    """Take what was written for options out of a verb's arguments.

    Args:
        given: the arguments; what is taken is gone from them.
        names: of the options; all of them by default.
    """
    wanted = names or tuple(DECLARATIONS)
    flags = {name: given.pop(name) for name in wanted if name in given}
    switches = {name: not given.pop(f"no_{name}") for name in wanted if f"no_{name}" in given}
    return flags | switches


def parse_flags(flags: dict[str, Any]) -> Options:
    """Return the options of a verb that attaches a model, before it is loaded.

    Args:
        flags: as `with_flags` gives them.

    Raises:
        OptionError: a value does not parse, or the folder for a disk cache cannot be used.
    """
    options = Options.parse(**flags)
    if options.disk_cache is not None:
        check_folder(options.disk_cache)
    return options


def was_given(invocation: typer.Context, name: str | None) -> bool:
    """Whether a user wrote an option, by its parameter's name, or has what its default says."""
    source = invocation.get_parameter_source(name or "")
    return source is not None and source.name == "COMMANDLINE"


Methods = Annotated[
    str,
    typer.Option(
        metavar="NAMES", help="Comma-separated, or all; `bench methods` tells what they are."
    ),
]
TrainedModel = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="A folder, hub id or GGUF file; smollm2, gemma3-270m, or demo: the embedded one.",
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


def prompt_option(*flags: str, help_text: str, metavar: str = NO_VALUE) -> Any:
    """Return an option of the prompt."""
    return typer.Option(*flags, help=help_text, metavar=metavar, rich_help_panel=PROMPT_PANEL)


def model_option(*flags: str, help_text: str, metavar: str = NO_VALUE) -> Any:
    """Return an option of the model."""
    return typer.Option(*flags, help=help_text, metavar=metavar, rich_help_panel=MODEL_PANEL)


def sampling_option(*flags: str, help_text: str, metavar: str = "N", **settings: Any) -> Any:
    """Return an option of how tokens are chosen."""
    return typer.Option(
        *flags, help=help_text, metavar=metavar, rich_help_panel=GENERATION_PANEL, **settings
    )
