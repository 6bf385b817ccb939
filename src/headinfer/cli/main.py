"""The `headinfer` command: its verbs, and what holds for all of them."""

import contextlib
import functools
import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from headinfer.cli.chat import chat
from headinfer.cli.command import Group, OnceCommand, names_no_verb
from headinfer.cli.console import (
    EXIT_BAD_INPUT,
    EXIT_INTERRUPTED,
    ClosedStdout,
    print_error,
    report,
)
from headinfer.cli.demo import demo
from headinfer.cli.generate import generate
from headinfer.cli.heads import heads
from headinfer.cli.interrupt import ending_the_process, run_one_verb
from headinfer.cli.options import NO_VALUE
from headinfer.cli.output import JsonCommand
from headinfer.cli.plan import plan
from headinfer.cli.probe import probe
from headinfer.cli.ranks import check_alone, leaving
from headinfer.cli.roofline import roofline
from headinfer.cli.serve import serve
from headinfer.cli.usage import told
from headinfer.errors import HeadInferError


class Verbs(Group):
    """A group of the verbs; wrong usage is told in one line, as all other errors are."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a verb; ends the process with its exit code unless `standalone_mode` is False."""
        run_verb = functools.partial(
            super().main, args, prog_name, complete_var, False, windows_expand_args, **extra
        )
        if not standalone_mode:
            return run_verb()
        try:
            code = run_verb()
            if sys.stdout is not None:
                sys.stdout.flush()  # where it cannot be, that is still to be said
        except typer.Abort:
            sys.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            raise
        except OSError as error:
            sys.exit(report(error))
        except Exception as error:
            # Older typer raises click's exceptions, newer ones its own: both have this method.
            if not hasattr(error, "format_message"):
                raise
            listed = "commands" if names_no_verb(error) else "options"
            print_error(f"{told(error, {})} (--help lists the {listed})")
            sys.exit(getattr(error, "exit_code", EXIT_BAD_INPUT))
        sys.exit(code or 0)


app = typer.Typer(
    cls=Verbs,
    name="headinfer",
    help="Exact LLM inference over contexts far larger than the GPU's memory, head by head.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import headinfer

        print(f"headinfer {headinfer.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _all_verbs(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar=NO_VALUE,
            callback=_print_version,
            is_eager=True,
            help="Print the version.",
        ),
    ] = False,
) -> None:
    verb = context.invoked_subcommand
    if verb is None:
        print(context.get_help())
    elif verb != "generate":  # which knows by its own options
        try:
            check_alone(verb)
        except HeadInferError as error:  # `reporting_errors` would end hearing signals here
            raise typer.Exit(report(error)) from None


app.command(cls=OnceCommand)(generate)
app.command(cls=OnceCommand)(chat)
app.command(cls=OnceCommand)(serve)
app.command(cls=OnceCommand)(demo)
app.command(cls=JsonCommand)(plan)
app.command(cls=JsonCommand)(probe)
app.command(cls=JsonCommand)(roofline)
app.command(cls=OnceCommand)(heads)


_GROUP = {
    "allow_extra_args": True,
    "allow_interspersed_args": False,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
"""Settings of a verb that hands all it is given on to verbs of its own."""


@app.command(context_settings=_GROUP)
def bench(context: typer.Context) -> None:
    """Measure speed and memory beside what people use instead, on this machine."""
    # Imported here and not above: the other verbs need none of it.
    from headinfer.cli import bench as benchmarks

    _hand_on(context, benchmarks.app)


@app.command(context_settings=_GROUP)
def evaluate(context: typer.Context) -> None:
    """Compare what a model predicts under each method with stock transformers."""
    from headinfer.cli import evaluate as evaluations

    _hand_on(context, evaluations.app)


def _hand_on(context: typer.Context, group: typer.Typer) -> None:
    verbs = typer.main.get_command(group)
    args = context.args or ["--help"]
    name = f"headinfer {context.info_name}"
    code = verbs.main(args=args, prog_name=name, standalone_mode=False)
    raise typer.Exit(code or 0)


def run() -> None:
    """Run the command line, in a process of its own."""
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal's encoding lacks must not end a long run.
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # if it is a text file
    ClosedStdout.install()
    run_one_verb()
    with leaving(), ending_the_process():
        app(prog_name="headinfer")


if __name__ == "__main__":
    run()
