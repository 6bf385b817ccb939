"""What a rotation before keys and values are rounded to 8 bits gains on a trained model.

    python benchmarks/rotation.py --json benchmarks/results/rotation-smollm2.json

SmolLM2 reads prose in chunks. After each one its keys and values are rounded as `--kv-cache int8`
or `fp8` rounds them, as they are or multiplied with a Hadamard matrix of random signs and turned
back. Told is the KL divergence from stock's predictions, as by `headinfer evaluate agreement`.
"""

import argparse
import json
import os
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line has it

import torch
from transformers import DynamicCache

from headinfer.bench.document import provenance
from headinfer.bench.machine import hardware
from headinfer.eight_bits import reference
from headinfer.eight_bits.layout import Code
from headinfer.evaluate.divergence import Tally
from headinfer.evaluate.prompts.haystack import prose
from headinfer.generation.model import ModelSource, load_config, load_model, load_tokenizer
from headinfer.integration.calls import cache_argument

CHUNK_TOKENS = 128


def rotation(dim: int) -> torch.Tensor:
    """Return an orthogonal matrix: Hadamard's, with random signs; the dim is a power of 2."""
    matrix = torch.ones(1, 1)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(2, (dim, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs * matrix / dim**0.5


def rounded(code: Code, values: torch.Tensor, *, rotated: bool) -> torch.Tensor:
    """Return values as they are read after they were rounded."""
    turn = rotation(values.shape[-1]) if rotated else torch.eye(values.shape[-1])
    turned = values @ turn
    back = torch.empty_like(turned)
    reference.unpack(code, reference.pack(code, turned), back)
    return back @ turn.T


def logits(model: Any, ids: torch.Tensor, code: Code | None, keys: bool, values: bool) -> Any:
    """Return the logits of a text, `[tokens, vocab]`, read in chunks."""
    cache, rows = DynamicCache(config=model.config), []
    for part in ids.split(CHUNK_TOKENS, 1):
        rows.append(model(input_ids=part, **cache_argument(model, cache)).logits[0])
        for layer in cache.layers if code is not None else ():
            layer.keys[:, :, -CHUNK_TOKENS:] = rounded(
                code, layer.keys[:, :, -CHUNK_TOKENS:], rotated=keys
            )
            layer.values[:, :, -CHUNK_TOKENS:] = rounded(
                code, layer.values[:, :, -CHUNK_TOKENS:], rotated=values
            )
    return torch.cat(rows)


@torch.no_grad()
def measured(tokens: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each code, with keys, values, both or none rotated."""
    source = ModelSource(name="smollm2")
    model, _ = load_model(source, load_config(source), dtype="float32", device="cpu")
    ids = load_tokenizer(source)(prose(None)[: 16 * tokens], return_tensors="pt").input_ids
    ids = ids[:, :tokens]
    stock = logits(model, ids, None, False, False)
    for code, keys, values in product(Code, (False, True), (False, True)):
        tally = Tally(torch.float32)
        tally.add(stock, logits(model, ids, code, keys, values), None)
        yield {
            "form": code.value,
            "keys_rotated": keys,
            "values_rotated": values,
            "kl_mean": tally.from_stock.mean,
            "kl_max": tally.from_stock.largest,
            "differing": tally.differing,
        }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    header = {**provenance(), "hardware": hardware(torch.device("cpu")), "tokens": given.tokens}
    header["chunk_tokens"] = CHUNK_TOKENS
    for row in measured(given.tokens):
        print(row, flush=True)
        rows.append(row)
        if given.json:
            given.json.write_text(json.dumps({"header": header, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
