"""How many drafted tokens are accepted: by real models, over code and prose that they never saw.

A text is this repository's own code or documents. At each of some places a model goes on with it,
greedily, for some verifications. Drafts are the model's own, over the oldest and the newest tokens;
those of a lookup; and, to compare with, those of a stock model that attends with a mask and shares
nothing with our loop but its weights. `headinfer bench` replays what is written here, as the
acceptance of random weights means nothing. Stopped, the same command goes on with the next text.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from draft_texts import TEXTS, first_tokens, text_of
from transformers import DynamicCache, PreTrainedModel

import headinfer
from headinfer.bench.document import provenance
from headinfer.bench.files import replace_json
from headinfer.bench.machine import hardware
from headinfer.cli.load import NamedSource, calm_transformers
from headinfer.evaluate.reading import sharing_weights
from headinfer.finding.masked import masked_heads
from headinfer.generation.acceptance import accepted_tokens
from headinfer.generation.candidates import Drafter, Itself, Lookup
from headinfer.generation.drafting import Drafting
from headinfer.generation.draws import shared_ahead
from headinfer.generation.model import load_config, load_model, load_tokenizer
from headinfer.generation.pace import FixedPace
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.calls import cache_argument, last_logits
from headinfer.integration.model_shape import model_shape
from headinfer.plan.memory import draft_sink_tokens
from headinfer.plan.shape import LayerKind

DRAFTERS: dict[str, Callable[[PreTrainedModel, OffloadedCache], Drafter]] = {
    "itself": Itself,
    "lookup": lambda _model, _cache: Lookup(3),
}
REFERENCE = "stock with a mask"


class Recorded(FixedPace):
    """A pace that keeps what each verification accepted."""

    def __init__(self, drafts: int) -> None:
        super().__init__(drafts)
        self.accepted: list[int] = []

    def note_accepted(self, accepted: int, *, rejected: bool) -> None:
        """Keep it."""
        self.accepted.append(accepted)


class Continued:
    """A model that goes on with a text at some places, with drafts and without.

    Args:
        name: of the model; it is loaded in float32, and attached meanwhile.
        given: options of the command line.
    """

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        source = NamedSource(name=name)
        self._tokenizer = load_tokenizer(source)
        model, _ = load_model(source, load_config(source), dtype="float32", device="cpu")
        self._stock = sharing_weights(model)
        self._model = model
        self._given = given
        sinks = draft_sink_tokens(given.draft_tokens)
        self._reach = {"sink_tokens": sinks, "recent_tokens": given.draft_tokens - sinks}
        self._heads = [
            range(layer.kv_heads if layer.kind is LayerKind.FULL else 0)
            for layer in model_shape(model).layers
        ]

    @torch.no_grad()
    def accepted(self, text_name: str) -> dict[str, list[list[int]]]:
        """Return by drafter what the verifications at each place of a text accepted."""
        given, text = self._given, self._read(text_name)
        found: dict[str, list[list[int]]] = {name: [] for name in (*DRAFTERS, REFERENCE)}
        first = given.tokens // 2
        step = (given.tokens - first) // given.starts
        with headinfer.attach(self._model, draft_tokens=given.draft_tokens) as offload:
            cache, stock = offload.new_cache(given.tokens), DynamicCache(config=self._stock.config)
            stock.activate_past_recording()
            read = 0
            for start in range(first, first + step * given.starts, step):
                for model, own in ((self._model, cache), (self._stock, stock)):
                    last_logits(model, text[:, read : start - 1], own)
                read = start - 1
                for name, drafter in DRAFTERS.items():
                    with closing(copy.deepcopy(cache)) as fork:
                        found[name].append(self._drafted(text[:, :start], fork, drafter))
                found[REFERENCE].append(self._reference(text[:, :start], copy.deepcopy(stock)))
        return found

    def _read(self, text_name: str) -> torch.Tensor:
        """Return the tokens of a text, `[1, tokens]`."""
        return torch.tensor([first_tokens(self._tokenizer, text_of(text_name), self._given.tokens)])

    def _drafted(
        self,
        prompt: torch.Tensor,
        cache: OffloadedCache,
        drafter: Callable[[PreTrainedModel, OffloadedCache], Drafter],
    ) -> list[int]:
        """Return what each verification of our loop accepted."""
        pace, given, model = Recorded(self._given.drafts), self._given, self._model
        loop = Drafting(cache, drafter(model, cache), pace, [cache.stats], ahead=shared_ahead)
        generate: Any = model.generate
        generate(
            prompt,
            custom_generate=loop,
            do_sample=False,
            max_new_tokens=given.new_tokens,
            eos_token_id=None,
            **cache_argument(model, cache),
        )
        return pace.accepted

    def _reference(self, prompt: torch.Tensor, cache: DynamicCache) -> list[int]:
        """Return what stock's own next tokens would have accepted of drafts by a mask."""
        model, given = self._stock, self._given
        greedy: list[int] = []
        new, ahead = prompt[:, -1:], copy.deepcopy(cache)
        for _ in range(given.new_tokens):
            new = last_logits(model, new, ahead).argmax()[None, None]
            greedy.append(int(new))
        accepted: list[int] = []
        done = 1  # the prompt's last token gives the first
        last_logits(model, prompt[:, -1:], cache)
        while done + given.drafts < given.new_tokens:
            drafted: list[int] = []
            new = torch.tensor([[greedy[done - 1]]])
            fork = copy.deepcopy(cache)
            with masked_heads(model, self._heads, **self._reach):
                for _ in range(given.drafts):
                    new = last_logits(model, new, fork).argmax()[None, None]
                    drafted.append(int(new))
            accepted.append(accepted_tokens(drafted, greedy[done:]))
            verified = greedy[done - 1 : done + accepted[-1]]
            last_logits(model, torch.tensor([verified]), cache)
            done += accepted[-1] + 1
        return accepted


def rows_of(
    model: str, text: str, found: dict[str, list[list[int]]], given: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a row for each drafter: all it accepted, and by places the mean and its error.

    The model's own drafts are also compared with the reference's, by the verifications that both
    have at a place.
    """
    whole = {
        drafter: [uncut(place, given.drafts, given.new_tokens) for place in places]
        for drafter, places in found.items()
    }
    for drafter, places in whole.items():
        row = {"model": model, "text": text, "drafter": drafter, "places": len(places)}
        row |= mean_and_error("mean", "standard_error", filter(None, places))
        if drafter == "itself":
            pairs = zip(places, whole[REFERENCE], strict=True)
            more = [[a - b for a, b in zip(*pair, strict=False)] for pair in pairs]
            row |= mean_and_error("more_than_reference", "its_standard_error", filter(None, more))
        yield row | {"accepted": places}


def uncut(accepted: list[int], drafts: int, new_tokens: int) -> list[int]:
    """Return the verifications of whole drafts: the last ones are cut by the end of the answer."""
    done, kept = 1, []
    for each in accepted:
        if done + drafts >= new_tokens:
            break
        kept.append(each)
        done += each + 1
    return kept


def mean_and_error(mean: str, error: str, places: Iterable[list[int]]) -> dict[str, float]:
    """Return the mean over places of what each has on average, and its standard error."""
    means = [statistics.fmean(place) for place in places]
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    return {mean: statistics.fmean(means), error: spread / math.sqrt(len(means))}


def parsed() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="smollm2,gemma3-270m")
    parser.add_argument("--tokens", type=int, default=4096, help="of a text")
    parser.add_argument("--starts", type=int, default=24, help="places in its second half")
    parser.add_argument("--new-tokens", type=int, default=32, help="at each place")
    parser.add_argument("--drafts", type=int, default=7, help="of a verification")
    parser.add_argument("--draft-tokens", type=int, default=512, help="that drafts attend")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", required=True, help="results, written anew after every text")
    return parser.parse_args()


def main() -> None:
    """Measure each model on each text."""
    given = parsed()
    calm_transformers(verbose=False)
    torch.set_flush_denormal(True)
    if given.threads:
        torch.set_num_threads(given.threads)
    settings = {
        name: value for name, value in vars(given).items() if name not in ("json", "models")
    }
    header: dict[str, Any] = {
        **provenance(),
        "hardware": hardware(torch.device("cpu")),
        "dtype": "float32",
    }
    done: dict[tuple[str, str], dict[str, list[list[int]]]] = {}
    if Path(given.json).exists():
        before = json.loads(Path(given.json).read_text(encoding="utf-8"))
        header = before["header"]
        if any(header["settings"][name] != value for name, value in settings.items()):
            sys.exit(f"{given.json} has other settings: {header['settings']}")
        for row in before["rows"]:
            done.setdefault((row["model"], row["text"]), {})[row["drafter"]] = row["accepted"]
    document: dict[str, Any] = {"header": header | {"settings": settings}, "rows": []}
    for name in given.models.split(","):
        continued: Continued | None = None
        for text in TEXTS:
            found = done.get((name, text))
            if found is None:
                continued = continued or Continued(name, given)
                found = continued.accepted(text)
            for row in rows_of(name, text, found, given):
                print({key: value for key, value in row.items() if key != "accepted"}, flush=True)
                document["rows"].append(row)
            replace_json(given.json, document, remedy="make room, then give the command again")


if __name__ == "__main__":
    main()
