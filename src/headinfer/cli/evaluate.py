"""`headinfer evaluate`: what a model answers and predicts under each method."""

import typer

from headinfer.cli.command import Group, OnceCommand
from headinfer.cli.evaluate_agreement import agreement
from headinfer.cli.evaluate_answers import verb
from headinfer.cli.evaluate_benchmarks import (
    LONGBENCH_SAMPLES,
    SCBENCH_SAMPLES,
    longbench_v2,
    scbench,
)
from headinfer.cli.evaluate_figure7 import METHODS, figure7
from headinfer.cli.evaluate_needle import needle
from headinfer.cli.evaluate_report import report
from headinfer.cli.evaluate_ruler import ruler
from headinfer.cli.output import JsonCommand

app = typer.Typer(
    cls=Group,
    help="Compare what a model answers and predicts under each method with stock transformers.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _verbs() -> None:
    """Compare what a model answers and predicts under each method with stock transformers."""


app.command(cls=JsonCommand)(agreement)
app.command("needle", cls=JsonCommand)(verb(needle))
app.command("figure7", cls=JsonCommand)(verb(figure7, samples=3, methods=METHODS))
app.command("ruler", cls=JsonCommand)(verb(ruler, samples=20))
app.command("longbench-v2", cls=JsonCommand)(verb(longbench_v2, samples=LONGBENCH_SAMPLES))
app.command("scbench", cls=JsonCommand)(verb(scbench, samples=SCBENCH_SAMPLES))
app.command(cls=OnceCommand)(report)
