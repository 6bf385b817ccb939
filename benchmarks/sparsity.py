"""Answers and predictions of a model against the share of its KV heads that keep all tokens.

Every pattern of heads is tried at every share, in one process that loads the model once. Asked are
facts hidden in prose, as `evaluate needle` does, and the next token at every position of a text, as
`evaluate agreement` does. `benchmarks/sparsity.sh` has the command lines. Stopped, the same command
goes on where it was.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from headinfer.bench.document import model_values, provenance
from headinfer.bench.files import replace_json
from headinfer.bench.machine import hardware
from headinfer.bench.methods import METHODS
from headinfer.bench.spec import TrialSpec
from headinfer.cli.bench_options import named_model
from headinfer.cli.load import NamedSource, calm_transformers
from headinfer.evaluate.answers.answering import Answerer
from headinfer.evaluate.divergence import Tally
from headinfer.evaluate.needle.task import Needle
from headinfer.evaluate.prompts.haystack import prose
from headinfer.evaluate.reading import aligned, most_tokens, read, sharing_weights
from headinfer.generation.model import load_config, load_model, load_tokenizer
from headinfer.plan.options import Options
from headinfer.plan.streaming import RANDOM

STOCK, SPARSE = "standard", "head-wise-sparse"
DTYPE = "float32"
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TEXT_CHARACTERS = 400_000


class Trials:
    """A model, what it is asked, and what stock transformers predicts."""

    def __init__(self, model_name: str, tokens: int, samples: int) -> None:
        source = NamedSource(name=model_name)
        self._planned = named_model(model_name, DTYPE, dummy_weights=False)
        self._tokenizer = load_tokenizer(source)
        self._model, _ = load_model(source, load_config(source), dtype=DTYPE, device="cpu")
        self._stock = sharing_weights(self._model)
        self._tokens = tokens
        self._task = Needle(depths=DEPTHS, samples=samples)
        ids = self._tokenizer(prose(None)[:TEXT_CHARACTERS])["input_ids"][:tokens]
        self._text = torch.tensor([ids])
        self._predicted: list[torch.Tensor] = []

    @property
    def model_values(self) -> dict[str, Any]:
        """What a result tells of the model."""
        return model_values(self._planned)

    def row(self, method_name: str, **streaming: Any) -> dict[str, Any]:
        """Return what one pattern at one share gives."""
        trial = TrialSpec(
            method=method_name,
            context_tokens=self._tokens,
            new_tokens=self._task.max_new_tokens,
            dtype=DTYPE,
            seed=0,
            model=self._planned,
            settings=Options.parse(device="cpu", **streaming),
        )
        with closing(METHODS[method_name](self._model, trial)) as method:
            answerer = Answerer(self._model, self._tokenizer, method)
            records = list(self._task.records(self._tokens, answerer, ()))
            found = {
                "needles": len(records),
                "found": sum(int(record.score) for record in records),
                "found_at_depths": self._task.scores(records),
            }
            return found | self._agreement(method, is_stock=method_name == STOCK)

    @torch.no_grad()
    def _agreement(self, method: Any, *, is_stock: bool) -> dict[str, Any]:
        pass_tokens = min(most_tokens(self._model), self._tokens)
        cache = method.new_cache(self._tokens)
        tally = Tally(torch.float32)
        if is_stock:
            self._predicted = list(read(self._model, cache, self._text, pass_tokens))
            return {"agreement": 1.0, "kl_mean": 0.0, "kl_max": 0.0}
        own = read(
            self._model, cache, self._text, min(method.pass_tokens(self._tokens), pass_tokens)
        )
        for predicted, given in aligned([iter(self._predicted), own]):
            tally.add(predicted, given)
        return {
            "agreement": 1 - tally.differing / tally.positions,
            "kl_mean": tally.from_stock.mean,
            "kl_max": tally.from_stock.largest,
        }


def wanted(
    patterns: Sequence[str], shares: Sequence[float], sinks: int, recent: int
) -> Iterator[tuple[dict[str, Any], str, dict[str, Any]]]:
    """Yield the key of each row, the method and its options: stock first, then by share."""
    yield {"pattern": "none", "sparsity": 0.0}, STOCK, {}
    reach = {"sink_tokens": sinks, "recent_tokens": recent}
    for share in shares:
        for pattern in patterns:
            key = {"pattern": Path(pattern).stem, "sparsity": share}
            yield key, SPARSE, {"sparsity": share, "head_pattern": pattern, **reach}
    yield (
        {"pattern": "all", "sparsity": 1.0},
        SPARSE,
        {"sparsity": 1.0, "head_pattern": RANDOM, **reach},
    )


def header(given: argparse.Namespace, trials: Trials) -> dict[str, Any]:
    """Return what the rows share: where, when and with what they were measured."""
    return {
        **provenance(),
        "hardware": hardware(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "model": trials.model_values,
        "dtype": DTYPE,
        "context_tokens": given.tokens,
        "samples": given.samples,
        "sink_tokens": given.sink_tokens,
        "recent_tokens": given.recent_tokens,
    }


def parsed() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("patterns", nargs="+", help="files of `headinfer heads`, or random:SEED")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.75, 0.25])
    parser.add_argument("--tokens", type=int, default=2048, help="of prompts and of the text")
    parser.add_argument("--samples", type=int, default=1, help="questions at each depth")
    parser.add_argument("--sink-tokens", type=int, default=64)
    parser.add_argument("--recent-tokens", type=int, default=256)
    parser.add_argument("--json", required=True, help="results, written anew after every row")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing."""
    given = parsed()
    calm_transformers(verbose=False)
    torch.set_flush_denormal(True)
    trials = Trials(given.model, given.tokens, given.samples)
    document = {"header": header(given, trials), "rows": []}
    if Path(given.json).exists():
        document = json.loads(Path(given.json).read_text(encoding="utf-8"))
    done = {(row["pattern"], row["sparsity"]) for row in document["rows"]}
    reach = (given.sink_tokens, given.recent_tokens)
    for key, method, options in wanted(given.patterns, given.shares, *reach):
        is_stock = method == STOCK
        if (key["pattern"], key["sparsity"]) in done and not is_stock:
            continue
        row = key | trials.row(method, **options)  # stock's predictions are what others are held to
        told = {name: row[name] for name in ("found", "needles", "agreement", "kl_mean")}
        print(key, told, flush=True)
        if not (is_stock and done):
            document["rows"].append(row)
            replace_json(given.json, document, remedy="make room, then give the command again")


if __name__ == "__main__":
    main()
