"""What the verbs of `headinfer evaluate` that ask questions share: options, the run, the end."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from headinfer.bench.catalogue import parse_methods
from headinfer.bench.spec import check_lists
from headinfer.cli import form_options as form
from headinfer.cli.bench_options import named_model
from headinfer.cli.console import reporting_errors
from headinfer.cli.contexts import parse_contexts
from headinfer.cli.load import (
    NamedSource,
    beyond_positions,
    calm_transformers,
    check_trained,
    max_positions,
    share_cores,
)
from headinfer.cli.options import (
    NO_VALUE,
    Dtype,
    DtypeChoice,
    Methods,
    Threads,
    TrainedModel,
    check_seed,
    take_flags,
    with_flags,
)
from headinfer.cli.output import (
    JsonPath,
    Resume,
    check_results,
)
from headinfer.cli.results import collect, exit_code, save, tell
from headinfer.cli.run_progress import RunProgress, run_console, showing_progress
from headinfer.cli.streaming import check_streaming_heads
from headinfer.evaluate.answers.document import Answers
from headinfer.evaluate.answers.job import AnswersSpec
from headinfer.evaluate.answers.launch import Launcher, Workers
from headinfer.evaluate.answers.run import AnswersRow, AnswersRun
from headinfer.evaluate.answers.table import render
from headinfer.evaluate.answers.task import Task
from headinfer.generation.model import choose_device
from headinfer.plan.options import Options
from headinfer.plan.streaming import STREAMING_OPTIONS

_FIRST_TOKENS, _LAST_TOKENS = 1024, 32 * 1024
"""Ends of the contexts without `--contexts`, where the model was made for so many positions."""

_EXIT = (
    "Exit code 1 when an exact method answers otherwise than stock in float32, or nothing was "
    "answered."
)


def make_launcher() -> Launcher:
    """Return what runs the jobs."""
    return Workers()


@with_flags(
    "device",
    "device_memory",
    "chunk_tokens",
    "tile_heads",
    "tile_tokens",
    "resident_tokens",
    "host_attention",
    *STREAMING_OPTIONS,
    device_memory="GPU memory that each method may use, such as 24GiB; auto: what is free.",
)
def shared(
    *,
    model: TrainedModel,
    contexts: Annotated[
        str | None,
        typer.Option(
            "--contexts",
            "--context",
            metavar="COUNTS",
            help="The most tokens of a prompt: 1K,4K.",
            show_default="1K, 2K, 4K and so on to the model's positions, at most 32K",
        ),
    ] = None,
    methods: Methods = "standard, headinfer",
    samples: Annotated[
        int, typer.Option(metavar="COUNT", min=1, help="Questions of each setting.")
    ] = 1,
    seed: Annotated[
        int, typer.Option(metavar="NUMBER", callback=check_seed, help="Of what is drawn.")
    ] = 0,
    raw: Annotated[
        bool,
        typer.Option("--raw", metavar=NO_VALUE, help="Leave the model's chat template out."),
    ] = False,
    dtype: Dtype = DtypeChoice.AUTO,
    load_in: form.LoadIn = None,
    flags: dict[str, Any],
    threads: Threads = None,
    json_path: JsonPath = None,
    resume: Resume = False,
) -> None:
    """The signature that all verbs share, beside the options of their tasks; never called."""


_OF_TASKS = ("samples", "seed", "raw")
"""Shared options that make the task."""

_SEEN = "model"
"""A shared option that makes the task too, where its maker has a parameter of this name."""


def verb(make_task: Callable[..., Task], **defaults: Any) -> Callable[..., None]:
    """Return the verb of a task.

    Args:
        make_task: makes it from options of its own, and from samples, seed and raw, and the model
            where it asks for that. Its docstring is the verb's.
        defaults: of shared options, where the verb has others.
    """
    taken = inspect.signature(make_task).parameters
    own = {name: parameter for name, parameter in taken.items() if name not in (*_OF_TASKS, _SEEN)}
    signature = inspect.signature(shared)
    parameters = [
        *own.values(),
        *(
            parameter.replace(default=defaults.get(name, parameter.default))
            for name, parameter in signature.parameters.items()
        ),
    ]

    def run(**given: Any) -> None:
        with reporting_errors():
            of_task = {name: given.pop(name) for name in (*own, *_OF_TASKS)}
            if _SEEN in taken:
                of_task[_SEEN] = given[_SEEN]
            task = make_task(**of_task)
            _run(task, given)

    run.__doc__ = f"{inspect.getdoc(make_task)}\n\n{_EXIT}"
    run.__annotations__ = {part.name: part.annotation for part in parameters}
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _run(task: Task, given: dict[str, Any]) -> None:
    path: str | None = given["json_path"]
    check_results(path, resume=given["resume"])
    share_cores()
    calm_transformers(verbose=False)
    console = run_console()
    with showing_progress(console) as progress:
        spec, note = _spec(task, given)
        choose_device(spec.settings.device)
        if note:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
        launcher = make_launcher()
        results = _begin(spec, launcher, progress, path if given["resume"] else None)

        def keep(row: AnswersRow) -> None:
            results.rows[row.key] = row

        def keep_tried(row: AnswersRow) -> None:
            keep(row)
            save(results, path)

        run = AnswersRun(results.spec, launcher, progress, results.arranged_rows, keep_tried)
        stopped = collect(run.rows(), keep, results, path)
    if stopped is not None and not results.rows:
        raise stopped
    tell(results, lambda: render(results), path, console, stopped=stopped is not None)
    if stopped is not None:
        raise stopped
    raise typer.Exit(exit_code(row.status for row in results.arranged_rows))


def _spec(task: Task, given: dict[str, Any]) -> tuple[AnswersSpec, str]:
    """Return what options ask for, and a note for the user; in the order of cost."""
    methods = parse_methods(given["methods"], evaluated=True)
    text = given["contexts"]
    contexts = None if text is None else sorted(parse_contexts(text, "1K,4K"))
    check_lists(methods, contexts or (1,))
    settings = Options.parse(**take_flags(dict(given)))
    check_trained(given["model"])

    from headinfer.bench.quantised import check_backends
    from headinfer.generation.model import load_config

    if given["methods"] != "all":  # of which those that cannot run say so in their rows
        check_backends(methods)
    config = load_config(NamedSource(name=given["model"]))
    positions = max_positions(config)
    if contexts is None:
        contexts = _contexts_up_to(positions or _LAST_TOKENS)
    dtype, load_in = given["dtype"].value, given["load_in"]
    if dtype == "auto":
        dtype = str(config.dtype or "float32").removeprefix("torch.")
    model = named_model(given["model"], dtype, load_in=load_in and load_in.value)
    check_streaming_heads(methods, settings, model.planned)
    spec = AnswersSpec(
        task=task,
        methods=methods,
        contexts=tuple(contexts),
        dtype=dtype,
        model=model,
        settings=settings,
        threads=given["threads"],
    )
    return spec, beyond_positions(config, max(contexts))


def _contexts_up_to(positions: int) -> list[int]:
    """Return powers of two, doubled to what a model was made for."""
    last = min(positions, _LAST_TOKENS)
    contexts = [min(_FIRST_TOKENS, last)]
    while 2 * contexts[-1] <= last:
        contexts.append(2 * contexts[-1])
    return contexts


def _begin(
    spec: AnswersSpec, launcher: Launcher, progress: RunProgress, path: str | None
) -> Answers:
    """Return the results of an earlier run to go on with, or those of one that begins."""
    progress.started("looking at the machine", None)
    machine = launcher.machine(spec.settings.device)
    if path is not None and Path(path).exists():
        return Answers.load(path).continued(spec, machine)
    return Answers.new(spec, machine)
