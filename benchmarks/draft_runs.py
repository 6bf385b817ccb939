"""What scripts about drafts begin with: a real model on the CPU, and the head of their results.

They share it, and it is no program of its own.
"""

import argparse
from typing import Any

import torch
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


def document_of(given: argparse.Namespace) -> dict[str, Any]:
    """Return results without a row yet, which say what they are of."""
    settings = {name: value for name, value in vars(given).items() if name != "json"}
    header = {**provenance(), "hardware": hardware(torch.device("cpu")), "settings": settings}
    return {"header": header, "rows": []}
