"""`headinfer evaluate ruler`: the tasks of RULER."""

from importlib.util import find_spec
from typing import Annotated

import typer

from headinfer.errors import OptionError
from headinfer.evaluate.ruler.kinds import check_files, parse_kinds
from headinfer.evaluate.ruler.task import Ruler

_NEEDED = ("lm_eval", "nltk", "scipy", "wonderwords")


def ruler(
    *,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Comma-separated, such as niah_single_1,vt; offline: those that need no files; "
            "or all.",
        ),
    ] = "offline",
    data: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Has the files that the other tasks need."),
    ] = None,
    samples: int,
    seed: int,
    raw: bool,
) -> Ruler:
    """Ask RULER's questions, with the prompts and scores of lm-evaluation-harness.

    A context is prompt and answer together, without the chat template. It
    may be of any length. A method that lacks memory for a prompt answers
    from one that is cut in the middle to what it holds.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise OptionError(
            f"RULER needs {', '.join(missing)}, not installed; pip install 'headinfer[eval]'"
        )
    task = Ruler(kinds=parse_kinds(tasks), samples=samples, seed=seed, raw=raw, data=data)
    check_files(task.kinds, data)
    return task
