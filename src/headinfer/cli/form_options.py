"""Options for the forms that models and prompts come in, and what they say is loaded."""

import enum
import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from headinfer.cli.options import (
    GENERATION_PANEL,
    MODEL_PANEL,
    PROMPT_PANEL,
    check_seed,
    model_option,
    sampling_option,
)
from headinfer.errors import OptionError
from headinfer.generation.adapter import adapter_of
from headinfer.generation.model import ModelSource
from headinfer.generation.quantised import has_fused_experts
from headinfer.generation.stops import check_stop
from headinfer.gguf_models import is_gguf_model, model_folder, read_stored
from headinfer.units import format_bytes


class LoadInChoice(str, enum.Enum):
    """What weights can be quantised to: each of `LOAD_IN`."""

    BITS_4 = "4bit"
    BITS_8 = "8bit"


def _load_in(help_text: str) -> Any:
    return typer.Option("--load-in", metavar="BITS", help=help_text, rich_help_panel=MODEL_PANEL)


System = Annotated[
    str | None,
    typer.Option(
        "--system",
        metavar="TEXT",
        help="A message of the system, before the prompt, in the chat template.",
        rich_help_panel=PROMPT_PANEL,
    ),
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="Values for the chat template, such as '{\"enable_thinking\": false}'.",
        rich_help_panel=PROMPT_PANEL,
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="ID_OR_PATH",
        help="A LoRA for the model, a folder or id; needs peft.",
        rich_help_panel=MODEL_PANEL,
    ),
]
LoadIn = Annotated[
    LoadInChoice | None,
    _load_in("Quantise weights to 4bit or 8bit as they are loaded; needs bitsandbytes."),
]
Model = Annotated[
    str,
    model_option(
        "--model",
        "-m",
        help_text="A folder or id of a transformers model, a GGUF file, smollm2, gemma3-270m, "
        "or demo: the embedded one.",
        metavar="ID_OR_PATH",
    ),
]
LocalFilesOnly = Annotated[
    bool, model_option("--local-files-only", help_text="Never ask the model hub.")
]
TrustRemoteCode = Annotated[
    bool, model_option("--trust-remote-code", help_text="Run code that comes with the model.")
]
Seed = Annotated[
    int | None,
    sampling_option("--seed", help_text="Makes sampling repeatable.", callback=check_seed),
]
GpuCount = Annotated[
    int | None,
    typer.Option(
        "--gpus",
        min=1,
        metavar="N",
        help="Spread the model's layers over the first N GPUs, each with memory of its own.",
        rich_help_panel=MODEL_PANEL,
    ),
]
PlannedLoadIn = Annotated[
    LoadInChoice | None, _load_in("Plan for weights in 4bit or 8bit, as generate has them.")
]
Draft = Annotated[
    str | None,
    sampling_option(
        "--draft",
        help_text="Draft so many tokens at a time, by --assistant, --prompt-lookup, or else the "
        "model itself; auto: what is fastest, by times measured; off. Same text, fewer steps.",
        metavar="COUNT",
    ),
]
Assistant = Annotated[
    str | None,
    model_option(
        "--assistant",
        help_text="A smaller model with the same tokenizer, which drafts: same text, fewer steps.",
        metavar="ID_OR_PATH",
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        "--stop",
        metavar="TEXT",
        help="End the answer before this text; may be repeated.",
        rich_help_panel=GENERATION_PANEL,
    ),
]


def parse_stop(given: list[str] | None) -> tuple[str, ...]:
    """Return the strings that end the answer.

    Raises:
        OptionError: one is empty.
    """
    try:
        return check_stop(given)
    except OptionError as error:
        raise OptionError(f"--stop: {error}") from error


def parse_template_values(given: str | None) -> dict[str, Any]:
    """Return values for the chat template by their names.

    Raises:
        OptionError: they are no object of JSON.
    """
    if given is None:
        return {}
    try:
        values = json.loads(given)
    except ValueError as error:
        raise OptionError(
            f"--chat-template-kwargs is not JSON ({error}); write it as "
            """'{"enable_thinking": false}', in quotes for the shell"""
        ) from error
    if not isinstance(values, dict):
        raise OptionError(
            f"""--chat-template-kwargs must be a JSON object, as '{{"name": value}}', not {given}"""
        )
    return values


def loaded_form(source: ModelSource, model: Any, weights_bytes: int) -> Iterator[str]:
    """Yield what there is to say of a loaded model's form; nothing for a checkpoint as it is.

    Args:
        source: where it came from.
        model: loaded.
        weights_bytes: of it, as it is now.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    size = format_bytes(weights_bytes)
    if is_gguf_model(source.name):
        stored = read_stored(model_folder(source.name, source.unpacked_dtype))
        packed = f"{format_bytes(stored.num_bytes)} of {', '.join(stored.types)}"
        if source.load_in is None:
            yield f"GGUF: {packed}, unpacked to {dtype}: {size} of weights"
        else:
            yield f"GGUF: {packed}, unpacked to {source.unpacked_dtype}"
    if source.load_in is not None:
        rest = "experts and the rest" if has_fused_experts(model) else "the rest"
        yield f"quantised: {source.load_in} by bitsandbytes, {rest} in {dtype}: {size} of weights"
    if source.adapter is not None:
        yield f"adapter {source.adapter}: {adapter_of(model)}, not merged"
