"""What scripts about drafts begin with: a real model on the CPU, and the head of their results.

They share it, and it is no program of its own.
"""

import argparse
from collections.abc import Set
from typing import Any

import torch
from kept_rows import kept_rows, settings_of
from transformers import PreTrainedModel

from headinfer.bench.document import provenance
from headinfer.bench.machine import hardware
from headinfer.cli.load import NamedSource, calm_transformers
from headinfer.generation.model import load_config, load_model, load_tokenizer


def loaded(name: str, threads: int | None) -> tuple[PreTrainedModel, Any]:
    """Return a model in float32 and its tokenizer.

    Args:
        name: as `--model` takes it.
        threads: of torch; None for as many as it takes by itself.
    """
    calm_transformers(verbose=False)
    torch.set_flush_denormal(True)
    if threads:
        torch.set_num_threads(threads)
    source = NamedSource(name=name)
    tokenizer = load_tokenizer(source)
    model, _ = load_model(source, load_config(source), dtype="float32", device="cpu")
    return model, tokenizer


def document_of(
    given: argparse.Namespace,
    device: torch.device | None = None,
    *,
    but: Set[str] = frozenset(),
) -> dict[str, Any]:
    """Return results to add rows to, which say what they are of.

    Args:
        given: the options, with those of `kept_rows.add_options`.
        device: that computes; None for the CPU.
        but: names of settings that may be others where rows are gone on with.
    """
    here = hardware(device or torch.device("cpu"))
    header = {**provenance(), "hardware": here, "settings": settings_of(given)}
    return {"header": header, "rows": kept_rows(given, header, but=but)}
