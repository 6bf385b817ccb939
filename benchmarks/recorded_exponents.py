"""Which exponents real models' keys and values have, and what packing makes of them.

    python benchmarks/recorded_exponents.py

A model in bfloat16 reads this repository's code and documents. Its keys and values are packed page
by page, and compared with what comes back. Three things are written of keys and of values: how far
exponents lie from their page's base, how often a base is chosen, and how many escapes pages have.
Beside these stand the escapes of another code: a table for each head, of the 15 exponents that are
most frequent in its first tokens. `headinfer bench --fill recorded` draws what is written here.
"""

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from headinfer.bench.document import provenance
from headinfer.bench.files import replace_json
from headinfer.cli.load import NamedSource, calm_transformers
from headinfer.generation.model import load_config, load_model, load_tokenizer
from headinfer.integration.model_shape import model_shape
from headinfer.packed.layout import ESCAPE, PAGE_TOKENS, WINDOW, PageLayout
from headinfer.packed.reference import overflowed, pack, unpack

ROOT = Path(__file__).parents[1]
TEXTS = ("src/headinfer/**/*.py", "docs/*.md")
CHUNK_TOKENS = TABLE_TOKENS = 1024


class Counted:
    """A count of the exponents of some pages, and of their escapes."""

    def __init__(self) -> None:
        self._exponents = torch.zeros(256, dtype=torch.int64)
        self._offsets: Counter[int] = Counter()
        self._bases: Counter[int] = Counter()
        self._escapes: list[int] = []
        self._entropies: list[float] = []
        self._missed = 0  # by the tables

    def add(self, values: torch.Tensor) -> None:
        """Count `[batch, heads, tokens, dim]` of bfloat16, whole pages of it."""
        dim = values.shape[-1]
        layout, pages = PageLayout(dim), pack(values)
        back = unpack(pages, dim, values.shape[2])
        assert not overflowed(pages, dim).any(), "a page has overflowed"
        assert torch.equal(back.view(torch.int16), values.view(torch.int16))
        exponents = (values.reshape(-1, layout.values).view(torch.int16) >> 7 & 0xFF).long()
        bases = pages[..., layout.header_at + 2].flatten()
        for page, base in zip(exponents, bases.tolist(), strict=True):
            counts = page.bincount(minlength=256)
            self._exponents += counts
            self._bases[base] += 1
            for exponent in counts.nonzero().flatten().tolist():
                self._offsets[exponent - base if exponent else -256] += int(counts[exponent])
            escapes = layout.values - int(counts[0] + counts[base + 1 : base + WINDOW + 1].sum())
            self._escapes.append(escapes)
            self._entropies.append(_entropy(counts))
        self._dim = dim
        for head in values.flatten(0, 1).view(torch.int16) >> 7 & 0xFF:
            frequent = head[:TABLE_TOKENS].flatten().bincount(minlength=256).topk(ESCAPE).indices
            self._missed += int((~torch.isin(head, frequent)).sum())

    def row(self) -> dict[str, Any]:
        """Return what is written of it."""
        values = PageLayout(self._dim).values * len(self._escapes)
        zeros = self._offsets.pop(-256, 0)
        return {
            "dim": self._dim,
            "pages": len(self._escapes),
            "escapes_share": sum(self._escapes) / values,
            "escapes_share_of_tables": self._missed / values,
            "most_escapes": max(self._escapes),
            "room": PageLayout(self._dim).max_escapes,
            "entropy_bits": _entropy(self._exponents),
            "page_entropy_bits": sum(self._entropies) / len(self._entropies),
            "bits": PageLayout(self._dim).page_bytes * 8 / PageLayout(self._dim).values,
            "zeros": zeros,
            "offsets": {str(key): count for key, count in sorted(self._offsets.items())},
            "bases": {str(key): count for key, count in sorted(self._bases.items())},
        }


def _entropy(counts: torch.Tensor) -> float:
    shares = [count / int(counts.sum()) for count in counts.tolist() if count]
    return -sum(share * math.log2(share) for share in shares)


@torch.inference_mode()
def read(name: str, tokens: int) -> tuple[DynamicCache, list[str]]:
    """Return the cache of a model that has read the text, and the kinds of its layers.

    All layers have all tokens.
    """
    source = NamedSource(name=name)
    model, _ = load_model(source, load_config(source), dtype="bfloat16", device="cpu")
    files = sorted(file for pattern in TEXTS for file in ROOT.glob(pattern))
    whole = "\n\n".join(file.read_text(encoding="utf-8") for file in files)
    ids = load_tokenizer(source)(whole[: 8 * tokens])["input_ids"][:tokens]
    assert len(ids) == tokens
    cache = DynamicCache()  # without a config no layer forgets what left its window
    for start in range(0, tokens, CHUNK_TOKENS):
        part = torch.tensor([ids[start : start + CHUNK_TOKENS]])
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        print(f"{name}: {start + part.shape[1]} tokens", flush=True)
    return cache, [shape.kind.value for shape in model_shape(model).layers]


@torch.inference_mode()
def main() -> None:
    """Read and count with each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="smollm2,gemma3-270m")
    parser.add_argument("--tokens", type=int, default=4096, help="a multiple of 64")
    parser.add_argument("--json", default=str(ROOT / "src/headinfer/bench/exponents.json"))
    given = parser.parse_args()
    calm_transformers(verbose=False)
    rows = []
    for name in given.models.split(","):
        cache, kinds = read(name, given.tokens // PAGE_TOKENS * PAGE_TOKENS)
        counted: dict[tuple[str, str], Counted] = {}
        for layer, kind in zip(cache.layers, kinds, strict=True):
            for part, values in (("keys", layer.keys), ("values", layer.values)):
                counted.setdefault((kind, part), Counted()).add(values)
        for (kind, part), count in counted.items():
            row = {"model": name, "layers": kind, "part": part} | count.row()
            print({key: value for key, value in row.items() if key not in ("offsets", "bases")})
            rows.append(row)
        document = {"header": provenance() | {"tokens": given.tokens}, "rows": rows}
        replace_json(given.json, document, remedy="make room, then give the command again")


if __name__ == "__main__":
    main()
