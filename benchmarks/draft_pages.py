"""How many drafts are accepted that attend the pages of the most attention mass: by a plain model.

A real model goes on with a text at some places, greedily and over all tokens. Its last eight rows
before the drafts weigh the tokens. Drafts then attend the sinks, the newest tokens and the pages of
the most weight. The engine has no such pages: this says what they would be worth, and which ones.
"""

import argparse
import itertools
import math
import pydoc_data.topics
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from draft_runs import document_of, loaded
from draft_texts import first_tokens
from draft_texts import text_of as text_of_repository
from kept_rows import add_options
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, PreTrainedModel

from headinfer.bench.files import replace_json
from headinfer.finding.attention import LayerCall, attending_by
from headinfer.generation.acceptance import accepted_tokens
from headinfer.integration.calls import cache_argument
from headinfer.integration.model_shape import model_shape
from headinfer.plan.memory import draft_sink_tokens
from headinfer.plan.shape import LayerKind

DRAFTS = 8
ROWS = 8
"""Tokens behind a place whose rows weigh the pages."""

FINE_TOKENS = 16
"""The smallest page."""

QUESTION = (
    "\n\n<|im_end|>\n<|im_start|>user\nWhat is said above?<|im_end|>\n<|im_start|>assistant\n"
)
TEXTS = {"documents": ("", QUESTION), "manual": ("",), "code": ("",)}
"""What is read, and what is said at each place before a model goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A choice of the tokens that drafts attend.

    Attributes:
        share: one part in `share` of a text's tokens is attended.
        page_tokens: of a page; 0 for the newest tokens and the sinks alone.
        pages: how much of what is attended, without the sinks, lies in pages, nearly.
        by_head: whether each KV head has pages of its own, else each layer.
        rows: newest rows whose weights are added up.
    """

    share: int
    page_tokens: int = 0
    pages: float = 0.5
    by_head: bool = True
    rows: int = ROWS

    def count(self, tokens: int) -> int:
        """Return how many pages are attended, of a text of so many tokens."""
        size, rest = self.page_tokens, self._divided(tokens)[1]
        return min(round(rest * self.pages / size), rest // size) if size else 0

    def fits(self, reach: int, own: int, tokens: int) -> bool:
        """Whether there are so many tokens at a place, and pages of them; see `attended`."""
        sinks, rest = self._divided(tokens)
        size, count = self.page_tokens, self.count(tokens)
        first = reach + own - (rest - count * size)
        return first <= reach and (not count or (first - sinks) // size >= count)

    def _divided(self, tokens: int) -> tuple[int, int]:
        """Return how many tokens are attended as sinks, and otherwise."""
        attended = tokens // self.share
        sinks = draft_sink_tokens(attended)
        return sinks, attended - sinks

    def attended(self, masses: torch.Tensor, reach: int, own: int, tokens: int) -> torch.Tensor:
        """Return which tokens of a text are attended, `[kv_heads, n]`, beside a place's own.

        Args:
            masses: weights of `FINE_TOKENS` tokens each behind the sinks, `[rows, kv_heads, fine]`.
            reach: tokens of the text that a place sees.
            own: tokens behind the place that are attended in any case, among the newest.
            tokens: of the text.
        """
        sinks, rest = self._divided(tokens)
        size, count, kv_heads = self.page_tokens, self.count(tokens), masses.shape[1]
        first = reach + own - (rest - count * size)
        assert first <= reach
        parts = [torch.arange(sinks).expand(kv_heads, -1)]
        if count:
            fine, there = size // FINE_TOKENS, (first - sinks) // size
            skipped = sinks // FINE_TOKENS
            weighed = masses[-self.rows :, :, skipped : skipped + there * fine].sum(0)
            weighed = weighed.unflatten(-1, (there, fine)).sum(-1)
            if not self.by_head:
                weighed = weighed.sum(0, keepdim=True).expand(kv_heads, -1)
            starts = sinks + size * weighed.topk(count).indices
            parts.append((starts[..., None] + torch.arange(size)).flatten(1))
        parts.append(torch.arange(first, reach).expand(kv_heads, -1))
        return torch.cat(parts, 1)


CHOICES = (
    Choice(share=8),
    *(Choice(share=8, page_tokens=size) for size in (16, 64, 128, 256, 512)),
    *(Choice(share=8, page_tokens=size, by_head=False) for size in (64, 256)),
    *(Choice(share=8, page_tokens=size, pages=part) for size in (64, 256) for part in (0.25, 0.75)),
    *(Choice(share=8, page_tokens=size, rows=1) for size in (64, 256)),
    Choice(share=32),
    *(Choice(share=32, page_tokens=size) for size in (16, 64, 128)),
    Choice(share=32, page_tokens=64, rows=1),
)


class Read:
    """A text that a model has read, at some places of which it goes on.

    Args:
        model: stock, of full attention in each layer.
        text: its tokens, `[1, tokens]`.
    """

    def __init__(self, model: PreTrainedModel, text: torch.Tensor) -> None:
        layers = model_shape(model).layers
        assert all(layer.kind is LayerKind.FULL for layer in layers)
        self._model, self._text = model, text
        self._kv_heads = layers[0].kv_heads
        cache = DynamicCache(config=model.config)
        model(text, logits_to_keep=1, **cache_argument(model, cache))
        self._kv = [(layer.keys[0], layer.values[0]) for layer in cache.layers]

    def continued(
        self, reaches: torch.Tensor, said: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
        """Go on at each place, over all tokens.

        Args:
            reaches: tokens of the text that each place sees.
            said: tokens behind them; none for the text's own next one.

        Returns:
            What was read and written behind each place, `[places, n]`; weights of the text's
            tokens, `[rows, layers, places, kv_heads, fine]`; keys and values behind each place.
        """
        places = len(reaches)
        forced = torch.tensor(said).expand(places, -1) if said else self._text[0, reaches][:, None]
        weighing = range(forced.shape[1], forced.shape[1] + ROWS)
        steps = weighing.stop + DRAFTS
        own = [_room(kv, (places, self._kv_heads), steps) for kv in self._kv]
        seen = torch.arange(self._text.shape[1]) < reaches[:, None, None, None]
        masses: list[torch.Tensor] = []
        written = torch.empty(places, steps + 1, dtype=torch.long)
        written[:, : forced.shape[1]] = forced

        def attend(call: LayerCall) -> torch.Tensor:
            keys, values = self._kv[call.layer]
            behind = _put(own[call.layer], call, step)
            query = call.query[..., 0, :] * call.scale
            far = torch.einsum("pkgd,ktd->pkgt", query, keys).masked_fill_(~seen, -math.inf)
            near = query @ behind[0].transpose(-1, -2)
            weights = torch.cat((far, near), -1).softmax(-1)
            far, near = weights[..., : keys.shape[1]], weights[..., keys.shape[1] :]
            if step in weighing:
                masses.append(far.sum(2).unflatten(-1, (-1, FINE_TOKENS)).sum(-1))
            out = torch.einsum("pkgt,ktd->pkgd", far, values) + near @ behind[1]
            return out[..., None, :]

        with attending_by(self._model, attend):
            for step in range(steps):
                following = self._next(written[:, step, None], reaches + step)
                if step + 1 >= forced.shape[1]:
                    written[:, step + 1] = following
        return written, torch.stack(masses).unflatten(0, (ROWS, -1)), own

    def drafted(
        self, attended: Sequence[Any], own: Any, reach: int, begun: torch.Tensor, count: int
    ) -> torch.Tensor:
        """Return what is drafted at one place, `[choices, DRAFTS]`.

        Args:
            attended: tokens of the text that drafts attend in each layer, by choice.
            own: the place's keys and values by layer.
            reach: tokens of the text that it sees.
            begun: the token before the drafts.
            count: tokens before that one that are the place's own.
        """
        heads = torch.arange(self._kv_heads)[:, None]
        rooms: list[list[list[torch.Tensor]]] = []
        for layer, kv in enumerate(self._kv):
            rooms.append([])
            for tokens in attended:
                parts = zip(kv, own[layer], strict=True)
                there = [torch.cat((a[heads, tokens[layer]], b[:, :count]), 1) for a, b in parts]
                rooms[-1].append([torch.cat((a, a[:, :DRAFTS]), 1)[None] for a in there])

        def attend(call: LayerCall) -> torch.Tensor:
            outs = []
            for row, room in enumerate(rooms[call.layer]):
                at = room[0].shape[2] - DRAFTS + step
                keys, values = _put(room, call, at, row)
                query = call.query[row : row + 1, ..., 0, :]
                outs.append(scaled_dot_product_attention(query, keys, values, scale=call.scale))
            return torch.cat(outs)[..., None, :]

        drafted = [begun.expand(len(attended))]
        with attending_by(self._model, attend):
            for step in range(DRAFTS):
                positions = torch.full((len(attended),), reach + count + step)
                drafted.append(self._next(drafted[-1][:, None], positions))
        return torch.stack(drafted[1:], 1)

    def _next(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = self._model(input_ids=tokens, position_ids=positions[:, None], use_cache=False)
        return out.logits[:, -1].argmax(-1)


def _room(kv: Sequence[torch.Tensor], rows: Sequence[int], tokens: int) -> list[torch.Tensor]:
    return [part.new_zeros(*rows, tokens, part.shape[-1]) for part in kv]


def _put(
    room: Sequence[torch.Tensor], call: LayerCall, at: int, row: int | None = None
) -> list[torch.Tensor]:
    """Put the keys and values of a call's token into a room, and return the room up to there."""
    rows = slice(None) if row is None else slice(row, row + 1)
    for part, new in zip(room, (call.keys, call.values), strict=True):
        part[:, :, at] = new[rows, :, 0]
    return [part[:, :, : at + 1] for part in room]


def check_tokens(given: argparse.Namespace, behind: int) -> None:
    """End the program with a line where a text has no room for the choices.

    Args:
        given: the options.
        behind: the most tokens that are said at a place.
    """

    def fits(tokens: int) -> bool:
        quarter, own = tokens // 4, max(behind, 1) + ROWS
        room = quarter - 2 * DRAFTS - behind > given.starts
        return room and all(each.fits(tokens - quarter, own, tokens) for each in CHOICES)

    if given.tokens % 64 == 0 and fits(given.tokens):
        return
    above = itertools.count(max(-(-given.tokens // 64), 1) * 64, 64)
    print(
        f"draft_pages.py: --tokens {given.tokens} leaves no room for the pages that are compared, "
        f"or is not in 64s; give {next(filter(fits, above))}",
        file=sys.stderr,
    )
    sys.exit(2)


def accepted(read: Read, reaches: Sequence[int], said: Sequence[int], tokens: int) -> list[Any]:
    """Return how many drafts are accepted, by choice and place."""
    written, masses, own = read.continued(torch.tensor(reaches), said)
    count = written.shape[1] - 1 - DRAFTS
    found: list[list[int]] = [[] for _ in CHOICES]
    for place, reach in enumerate(reaches):
        attended = [
            [each.attended(layer, reach, count, tokens) for layer in masses[:, :, place].unbind(1)]
            for each in CHOICES
        ]
        kept = [[part[place] for part in kv] for kv in own]
        drafts = read.drafted(attended, kept, reach, written[place, count], count)
        right = written[place, count + 1 :].tolist()
        for choice, row in zip(found, drafts.tolist(), strict=True):
            choice.append(accepted_tokens(row, right))
    return found


def text_of(name: str) -> str:
    """Return a text."""
    if name == "manual":
        return "\n\n".join(pydoc_data.topics.topics.values())
    return text_of_repository(name)


def rows_of(name: str, found: list[list[int]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each choice."""
    for choice, places in zip(CHOICES, found, strict=True):
        yield {"text": name} | asdict(choice) | {"accepted": places}


def table(rows: Sequence[dict[str, Any]], tokens: int) -> str:
    """Return a table: what is accepted by text, and how much more than of the newest alone."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    lines = [
        "| attended | pages | chosen by | rows | " + " | ".join([*texts, "all"]) + " |",
        "|---|---|---|---:|" + "---:|" * (len(texts) + 1),
    ]
    newest: dict[tuple[int, str], list[int]] = {}
    for choice in CHOICES:
        cells = [f"1/{choice.share}", "none", "", ""]
        if choice.page_tokens:
            head = "head" if choice.by_head else "layer"
            pages = f"{choice.count(tokens)} of {choice.page_tokens}"
            cells[1:] = [pages, head, str(choice.rows)]
        own = [row for row in rows if all(row[key] == of for key, of in asdict(choice).items())]
        by_text = {row["text"]: row["accepted"] for row in own}
        together = list(itertools.chain.from_iterable(by_text.values()))
        for name, places in (by_text | {"all": together}).items():
            before = newest.setdefault((choice.share, name), places)
            gain = _gain(places, before) if choice.page_tokens else ""
            cells.append(f"{statistics.fmean(places):.2f}{gain}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gain(places: Sequence[int], before: Sequence[int]) -> str:
    """Return the mean of what each place has more than before, and its standard error."""
    gains = [a - b for a, b in zip(places, before, strict=True)]
    return f" ({statistics.fmean(gains):+.2f} ± {statistics.stdev(gains) / len(gains) ** 0.5:.2f})"


def parsed() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=8192, help="of a text, in 64s")
    parser.add_argument("--starts", type=int, default=16, help="places in its last quarter")
    parser.add_argument("--texts", default=",".join(TEXTS))
    parser.add_argument("--threads", type=int, default=None)
    add_options(parser, "text")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Measure each choice on each text."""
    given = parsed()
    model, tokenizer = loaded(given.model, given.threads)
    document = document_of(given, but={"texts"})
    done = {row["text"] for row in document["rows"]}
    names = given.texts.split(",")
    said_behind = {said for name in names for said in TEXTS[name]}
    check_tokens(given, max(len(tokenizer(said)["input_ids"]) for said in said_behind))
    quarter = given.tokens // 4
    last = given.tokens - quarter
    for name in names:
        missing = [said for said in TEXTS[name] if ("chat" if said else name) not in done]
        if not missing:
            continue
        ids = first_tokens(tokenizer, text_of(name), given.tokens)
        read = Read(model, torch.tensor([ids]))
        for said in missing:
            behind = tokenizer(said)["input_ids"] if said else []
            most = quarter - 2 * DRAFTS - len(behind) - 1
            reaches = [last + at * most // given.starts for at in range(given.starts)]
            found = accepted(read, reaches, behind, given.tokens)
            document["rows"] += rows_of("chat" if said else name, found)
            replace_json(given.json, document, remedy="make room, then give the command again")
            print(table(document["rows"], given.tokens), flush=True)


if __name__ == "__main__":
    main()
