"""The options of the benchmark verbs, and the run that they ask for."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from headinfer.bench.catalogue import parse_methods
from headinfer.bench.model_spec import DTYPE_BYTES, Model, ModelSpec, NamedModel
from headinfer.bench.replay import Replay
from headinfer.bench.spec import BenchSpec, Command, Fill
from headinfer.cli import form_options as form
from headinfer.cli.contexts import parse_contexts
from headinfer.cli.options import (
    MODEL_PANEL,
    NO_VALUE,
    Methods,
    check_seed,
    flag_of,
    parse_flags,
    take_flags,
    with_flags,
)
from headinfer.cli.output import JsonPath, Resume
from headinfer.errors import OptionError
from headinfer.estimate.presets import PRESETS
from headinfer.plan.option_values import KVCacheName, kv_cache_name

_DEFAULT_SHAPE = {
    "layers": 4,
    "hidden_size": 512,
    "heads": 16,
    "kv_heads": 4,
    "head_dim": 128,
    "vocab_size": 4096,
}


def _shape_option(help_text: str, default: str) -> Any:
    return typer.Option(
        help=help_text, metavar="COUNT", show_default=default, rich_help_panel=MODEL_PANEL
    )


def _size(name: str, help_text: str) -> Any:
    return _shape_option(help_text, str(_DEFAULT_SHAPE[name]))


@with_flags(
    "device",
    "device_memory",
    "host_memory",
    "disk_cache",
    "chunk_tokens",
    "tile_heads",
    "tile_tokens",
    "kv_cache",
    kv_cache="Forms of a GPU's KV cache in CPU memory, comma-separated: auto, dense, packed, and "
    "int8 and fp8 (approximate). Each method that leaves the choice is measured with each. auto is "
    "dense in all of them but headinfer.",
)
def options(
    *,
    contexts: Annotated[
        str,
        typer.Option(
            "--contexts", "--context", metavar="COUNTS", help="Tokens of the prompts: 1K,10K,100K."
        ),
    ] = "32K",
    methods: Methods = "standard, headinfer",
    fill: Annotated[
        Fill,
        typer.Option(
            metavar="HOW",
            help="How caches come to hold the prompt: prefill; or random keys and values, which "
            "takes no time; or recorded, random ones with the exponents of real models.",
        ),
    ] = Fill.PREFILL,
    new_tokens: Annotated[
        int, typer.Option(metavar="COUNT", help="Decode steps of each trial.")
    ] = 8,
    repeats: Annotated[
        int, typer.Option(metavar="COUNT", help="Fresh processes for each method and context.")
    ] = 1,
    time_limit: Annotated[
        int, typer.Option(metavar="SECONDS", help="A trial that takes longer is ended.")
    ] = 3600,
    gpus: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            help="GPUs for the methods one, layers and heads; --device-memory is of each. Standard "
            "and chunked-prefill have layers on all.",
        ),
    ] = 1,
    replay: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|N/M",
            help="What verifications accept, for the method drafts: a file that "
            "benchmarks/drafts.py wrote, or N of M drafts each time.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="NUMBER", callback=check_seed, help="Of weights and tokens.")
    ] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="A folder, hub id, GGUF file, smollm2 or gemma3-270m; with --dummy-weights also a "
            "preset such as llama-3-8b.",
            show_default="a Llama of the shape below",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None,
    dummy_weights: Annotated[
        bool,
        typer.Option(
            "--dummy-weights",
            metavar=NO_VALUE,
            help="Random weights of the model's shape; nothing is downloaded for presets.",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = False,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="TYPE", help="bfloat16, float16 or float32.", rich_help_panel=MODEL_PANEL
        ),
    ] = "bfloat16",
    load_in: form.LoadIn = None,
    layers: Annotated[int | None, _size("layers", "Decoder layers.")] = None,
    hidden_size: Annotated[int | None, _size("hidden_size", "Hidden width.")] = None,
    heads: Annotated[int | None, _size("heads", "Query heads.")] = None,
    kv_heads: Annotated[int | None, _size("kv_heads", "KV heads.")] = None,
    head_dim: Annotated[int | None, _size("head_dim", "Elements of a head.")] = None,
    intermediate_size: Annotated[
        int | None, _shape_option("Width of the MLP.", "4 x hidden")
    ] = None,
    vocab_size: Annotated[int | None, _size("vocab_size", "Vocabulary.")] = None,
    flags: dict[str, Any],
    json_path: JsonPath = None,
    resume: Resume = False,
) -> None:
    """The signature that all verbs share, each with defaults of its own; never called."""


def run_spec(command: Command, given: dict[str, Any]) -> BenchSpec:
    """Return what options ask for.

    Args:
        command: the verb.
        given: values of `options` by name.

    Raises:
        HeadInferError: an option does not parse or is out of range, or there is no such model.
    """
    if given["dtype"] not in DTYPE_BYTES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {given['dtype']!r}")
    flags = take_flags(dict(given))
    kv_caches = _forms(flags.pop("kv_cache"))
    return BenchSpec(
        command=command,
        methods=parse_methods(given["methods"], gpus=given["gpus"]),
        contexts=tuple(sorted(parse_contexts(given["contexts"], "1K,10K,100K"))),
        new_tokens=given["new_tokens"],
        repeats=given["repeats"],
        dtype=given["dtype"],
        seed=given["seed"],
        model=_model(given),
        settings=parse_flags(flags),
        kv_caches=kv_caches,
        fill=given["fill"],
        time_limit_s=given["time_limit"],
        gpus=given["gpus"],
        replay=None if given["replay"] is None else Replay.parse(given["replay"]),
    )


def _forms(text: str) -> tuple[KVCacheName, ...]:
    """Return the forms in a comma-separated list."""
    return tuple(kv_cache_name("kv_cache", name.strip()) for name in text.split(","))


def _model(given: dict[str, Any]) -> Model:
    sizes = {
        name: given[name]
        for name in (*_DEFAULT_SHAPE, "intermediate_size")
        if given[name] is not None
    }
    name, load_in = given["model"], given["load_in"]
    if load_in is not None and (name is None or given["dummy_weights"] or given["gpus"] > 1):
        raise OptionError(
            f"--load-in {load_in.value} quantises weights that are loaded onto one device: give "
            "--model, and neither --dummy-weights nor --gpus"
        )
    if name is None:
        if given["dummy_weights"]:
            raise OptionError("--dummy-weights needs --model; without it weights are random anyway")
        shape = _DEFAULT_SHAPE | sizes
        shape.setdefault("intermediate_size", 4 * shape["hidden_size"])
        return _spec(shape)
    if sizes:
        raise OptionError(
            f"{flag_of(next(iter(sizes)))} is for models without --model; leave one of them out"
        )
    return named_model(
        name,
        given["dtype"],
        dummy_weights=given["dummy_weights"],
        load_in=load_in and load_in.value,
    )


def _spec(shape: dict[str, int]) -> ModelSpec:
    """Return a model of a shape, whose sizes are options of this verb and keys of configs else."""
    try:
        return ModelSpec(**shape)
    except OptionError as error:
        names = rf"\b({'|'.join(shape)})\b"
        told = re.sub(names, lambda name: flag_of(name[0]), str(error))
        raise OptionError(told) from error


def named_model(
    name: str, dtype: str, *, dummy_weights: bool = False, load_in: str | None = None
) -> NamedModel:
    """Return a model by the name a user has for it: a preset, a folder or a hub id.

    Args:
        name: the name.
        dtype: a torch dtype's name.
        dummy_weights: whether its weights are random.
        load_in: "4bit" or "8bit" to quantise weights as they are loaded.

    Raises:
        HeadInferError: there is no such model, or it cannot be had in this form.
    """
    from headinfer.cli.load import NamedSource
    from headinfer.cli.shapes import shape_of
    from headinfer.generation.model import load_config

    if name in PRESETS and not dummy_weights:
        raise OptionError(
            f"{name} is a shape without weights: add --dummy-weights, or give a folder or hub id"
        )
    if load_in is not None and dtype == "float32":
        raise OptionError(
            f"--load-in {load_in} has products that depend on how many tokens pass at once, so "
            "that methods cannot be compared in float32: take --dtype bfloat16"
        )
    if load_in is not None:
        load_config(NamedSource(name=name, load_in=load_in))  # or why not
    shape = shape_of(name, dtype=dtype, quantised=load_in)
    if not dummy_weights:
        location = NamedSource(name=name).location()
        return NamedModel(name=name, location=location, config=None, planned=shape, load_in=load_in)
    config = PRESETS.get(name) or load_config(NamedSource(name=_folder(name))).to_dict()
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    return NamedModel(name=name, location=None, config=kept, planned=shape)


def _folder(name: str) -> str:
    """Return the folder of a config.json, and all else as it is."""
    file = Path(name).expanduser()
    return str(file.parent) if file.name == "config.json" else name
