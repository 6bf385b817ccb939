"""`headinfer roofline`: what attention can reach on a machine, regular and offloaded."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from headinfer.cli.console import reporting_errors, stderr_console
from headinfer.cli.contexts import parse_contexts
from headinfer.cli.hardware import HardwareName, hardware_of
from headinfer.cli.options import NO_VALUE, OUTPUT_PANEL
from headinfer.cli.output import STDOUT, JsonPath, check_writable, write_json
from headinfer.cli.roofline_table import render, render_paper
from headinfer.cli.text import wrapping_console
from headinfer.errors import OptionError
from headinfer.estimate.roofline import (
    PAPER_CONTEXTS,
    Row,
    attended_layer,
    link_hidden_from_tokens,
    roofline_rows,
)
from headinfer.estimate.roofline_paper import PAPER_HARDWARE, PAPER_MODEL, compare
from headinfer.plan.hardware import Hardware
from headinfer.plan.shape import ModelShape
from headinfer.plot.files import check_plot
from headinfer.units import format_tokens

_CONTEXTS = ",".join(map(format_tokens, PAPER_CONTEXTS))
_MIN_WIDTH = 80
"""Columns of the tables; a narrower terminal breaks their lines instead of cutting figures off."""


def roofline(
    hardware: HardwareName = PAPER_HARDWARE,
    model: Annotated[
        str,
        typer.Option("--model", "-m", metavar="NAME", help="Preset, folder, config.json or id."),
    ] = PAPER_MODEL,
    contexts: Annotated[
        str,
        typer.Option("--contexts", metavar="COUNTS", help="Context lengths, comma-separated."),
    ] = _CONTEXTS,
    causal: Annotated[
        bool,
        typer.Option(
            "--causal",
            metavar=NO_VALUE,
            help="Count in prefill only the pairs that a causal mask leaves: half the square.",
        ),
    ] = False,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            metavar=NO_VALUE,
            help="Print the paper's Table 12 as paper / ours, and why they differ.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = False,
    plot: Annotated[
        str | None,
        typer.Option(
            "--plot",
            metavar="PATH",
            help="Draw it to a .png, .svg or .pdf file; needs matplotlib.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = None,
    json_path: JsonPath = None,
) -> None:
    """Show what bounds attention on a machine: compute, memory or the link.

    Each operator, phase and context has its operations, bytes, operations a
    byte, and the rate that the lowest roof allows. Keys and values are in GPU
    memory, and then in CPU memory.
    """
    with reporting_errors():
        check_writable("--json", json_path)
        if plot is not None:
            check_writable("--plot", plot)
            check_plot(plot)
        if paper:
            _check_paper(hardware=hardware, model=model, contexts=contexts, causal=causal)
        machine = hardware_of(hardware)
        tokens = sorted(set(parse_contexts(contexts, _CONTEXTS)))

        from headinfer.cli.shapes import shape_of

        shape = shape_of(model)
        rows = roofline_rows(shape, machine, tokens, causal=causal)
        if plot is not None:
            from headinfer.plot.roofline import draw
            from headinfer.plot.style import save

            save(draw(shape, machine, rows), plot)
        if json_path is not None:
            write_json(json_path, _document(shape, machine, rows, causal=causal, paper=paper))
        if json_path != STDOUT:
            console = wrapping_console()
            console.width = max(console.width, _MIN_WIDTH)
            console.print(
                render_paper(compare(shape))
                if paper
                else render(shape, machine, rows, causal=causal)
            )
        for path in (plot, json_path):
            if path not in (None, STDOUT):
                stderr_console().print(f"written to {path}", markup=False)


def _check_paper(**given: str | bool) -> None:
    """Refuse what the paper has no figures for.

    Raises:
        OptionError: an option is not that of Table 12.
    """
    table_12 = {
        "hardware": PAPER_HARDWARE,
        "model": PAPER_MODEL,
        "contexts": _CONTEXTS,
        "causal": False,
    }
    for name, value in given.items():
        if value != table_12[name]:
            raise OptionError(
                f"--paper compares with Table 12, which is --hardware {PAPER_HARDWARE} --model "
                f"{PAPER_MODEL} --contexts {_CONTEXTS}; leave --{name} out"
            )


def _document(
    shape: ModelShape, hardware: Hardware, rows: Sequence[Row], *, causal: bool, paper: bool
) -> dict[str, Any]:
    """Return everything computed as plain values; docs/roofline.md lists the keys."""
    layer = attended_layer(shape)
    document = {
        "model": {
            "name": shape.name,
            "query_heads": shape.query_heads,
            "kv_heads": layer.kv_heads,
            "key_dim": layer.key_dim,
            "value_dim": layer.value_dim,
            "kv_itemsize": shape.kv_itemsize,
        },
        "hardware": dataclasses.asdict(hardware),
        "causal": causal,
        "link_hidden_from_tokens": link_hidden_from_tokens(shape, hardware),
        "rows": [_plain(dataclasses.asdict(row)) for row in rows],
    }
    if paper:
        document["paper"] = [
            {
                "phase": row.phase.value,
                "operator": row.operator.value,
                "context_tokens": row.context_tokens,
                "cells": [_plain(dataclasses.asdict(cell)) for cell in cells],
            }
            for row, cells in compare(shape)
        ]
    return document


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return a dictionary with the values of enums in their place."""
    return {
        name: _plain(value)
        if isinstance(value, dict)
        else value.value
        if isinstance(value, enum.Enum)
        else value
        for name, value in values.items()
    }
