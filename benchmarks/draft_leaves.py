"""What second choices would gain that are verified beside the drafts: by a plain model.

A real model goes on with a text at some places, greedily and over all tokens. Before each of these
tokens it drafts over the oldest and the newest ones. Its second choice at a drafted position would
be a leaf of the same verification. Where a draft is rejected and its leaf is right, the
verification gives one token more. A second branch is what a lookup finds. The engine verifies no
branches: this says what they would be worth.
"""

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from draft_runs import document_of, loaded
from draft_texts import TEXTS, first_tokens, text_of
from kept_rows import add_options
from transformers import DynamicCache, PreTrainedModel

from headinfer.bench.files import replace_json
from headinfer.finding.attention import LayerCall, attending_by
from headinfer.generation.acceptance import accepted_tokens
from headinfer.integration.calls import cache_argument
from headinfer.integration.model_shape import model_shape
from headinfer.plan.memory import draft_sink_tokens
from headinfer.plan.shape import LayerKind

DRAFTS = 15
"""The most of a verification."""

SHARES = 8, 32
"""One part in so many of a text's tokens is attended by drafts."""

NGRAM_TOKENS = 3
"""The most tokens that a lookup looks for."""


class Node(NamedTuple):
    """A position of a draft: its two likeliest tokens.

    Attributes:
        token: the drafted one.
        second: the likeliest one after it.
        odds: probabilities of both, as the draft says them.
    """

    token: int
    second: int
    odds: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A choice of what is verified.

    Attributes:
        share: one part in `share` of a text's tokens is attended by a model's own drafts; 0 for
            the drafts of a lookup.
        drafts: that are verified at once, one after the other.
        leaves: second choices beside them, those that the draft holds likeliest.
        branch: whether what a lookup finds next is verified as well, as many tokens.
    """

    share: int
    drafts: int
    leaves: int = 0
    branch: bool = False

    @property
    def rows(self) -> int:
        """New tokens of the pass."""
        return 1 + self.drafts * (1 + self.branch) + self.leaves


CHOICES = (
    *(Choice(share=8, drafts=4, leaves=leaves) for leaves in (0, 2, 4)),
    *(Choice(share=8, drafts=7, leaves=leaves) for leaves in (0, 2, 4, 7)),
    Choice(share=8, drafts=15),
    *(Choice(share=32, drafts=drafts, leaves=own) for drafts in (4, 7) for own in (0, drafts)),
    Choice(share=32, drafts=15),
    *(Choice(share=share, drafts=drafts, branch=True) for share in SHARES for drafts in (4, 7)),
    *(Choice(share=0, drafts=drafts, branch=own) for drafts in (4, 7) for own in (False, True)),
)


class Read:
    """A text that a model has read, at some places of which it goes on.

    Args:
        model: stock, of full attention in each layer.
        text: its tokens, `[1, tokens]`.
    """

    def __init__(self, model: PreTrainedModel, text: torch.Tensor) -> None:
        assert all(layer.kind is LayerKind.FULL for layer in model_shape(model).layers)
        self._model, self._text = model, text
        cache = DynamicCache(config=model.config)
        model(text, logits_to_keep=1, **cache_argument(model, cache))
        self._kv = [(layer.keys[0], layer.values[0]) for layer in cache.layers]

    def continued(self, reaches: torch.Tensor, steps: int) -> tuple[torch.Tensor, list[Any]]:
        """Go on at each place, over all tokens.

        Args:
            reaches: tokens of the text that each place sees.
            steps: tokens to write.

        Returns:
            The text's own next token and what is written behind it, `[places, 1 + steps]`; keys and
            values of all but the last, by layer, `[places, kv_heads, steps, dim]`.
        """
        seen = torch.arange(self._text.shape[1]) < reaches[:, None]
        own: list[Any] = [([], []) for _ in self._kv]
        written = [self._text[0, reaches]]

        def attend(call: LayerCall) -> torch.Tensor:
            for part, new in zip(own[call.layer], (call.keys, call.values), strict=True):
                part.append(new)
            near = [torch.cat(part, 2) for part in own[call.layer]]
            return _attended(call, self._kv[call.layer], near, seen)

        with attending_by(self._model, attend):
            for step in range(steps):
                written.append(self._scores(written[step], reaches + step).argmax(-1))
        return torch.stack(written, 1), [[torch.cat(part, 2) for part in kv] for kv in own]

    def drafted(
        self, attended_tokens: int, reach: int, own: Any, written: torch.Tensor
    ) -> list[list[Node]]:
        """Return what is drafted at one place behind each token that was written, but the last.

        Args:
            attended_tokens: that a draft attends, beside what was drafted.
            reach: tokens of the text that the place sees.
            own: keys and values of what was written, by layer, `[kv_heads, n, dim]`.
            written: what was written, `[n + 1]`.
        """
        rows, sinks = len(written) - 1, draft_sink_tokens(attended_tokens)
        tokens, starts = torch.arange(reach + rows), reach + torch.arange(rows)[:, None]
        newest = tokens >= starts - (attended_tokens - sinks)
        seen = ((tokens < sinks) | newest) & (tokens < starts)
        some = seen.any(0)
        far = [
            tuple(torch.cat((a[:, :reach], b), 1)[:, some] for a, b in zip(*both, strict=True))
            for both in zip(self._kv, own, strict=True)
        ]
        drafts: list[Any] = [([], []) for _ in far]
        found: list[list[Node]] = [[] for _ in range(rows)]

        def attend(call: LayerCall) -> torch.Tensor:
            for part, new in zip(drafts[call.layer], (call.keys, call.values), strict=True):
                part.append(new)
            near = [torch.cat(part, 2) for part in drafts[call.layer]]
            return _attended(call, far[call.layer], near, seen[:, some])

        newer = written[:-1]
        with attending_by(self._model, attend):
            for step in range(DRAFTS):
                scores = self._scores(newer, starts[:, 0] + step)
                odds, best = scores.float().softmax(-1).topk(2)
                for row, two, both in zip(found, best.tolist(), odds.tolist(), strict=True):
                    row.append(Node(*two, tuple(both)))
                newer = best[:, 0]
        return found

    def _scores(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        given = {"input_ids": tokens[:, None], "position_ids": positions[:, None]}
        scores: torch.Tensor = self._model(**given, use_cache=False).logits[:, -1]
        return scores


def _attended(call: LayerCall, shared: Any, near: Any, seen: torch.Tensor) -> torch.Tensor:
    """Return the attention of one query a row, over what all rows share and what is its own.

    Args:
        call: `[rows, kv_heads, group, 1, dim]`.
        shared: keys and values, `[kv_heads, n, dim]`.
        near: keys and values, `[rows, kv_heads, m, dim]`.
        seen: which of the shared ones a row sees, `[rows, n]`.
    """
    query = call.query[..., 0, :] * call.scale
    scores = torch.einsum("rkgd,ktd->rkgt", query, shared[0])
    scores = scores.masked_fill_(~seen[:, None, None], -math.inf)
    weights = torch.cat((scores, query @ near[0].transpose(-1, -2)), -1).softmax(-1)
    far, own = weights.split((shared[0].shape[1], near[0].shape[2]), -1)
    return (torch.einsum("rkgt,ktd->rkgd", far, shared[1]) + own @ near[1])[..., None, :]


def looked_up(text: Sequence[int], most: int, avoided: int | None = None) -> list[int]:
    """Return what followed where most of the newest tokens stood last, as the library's lookup.

    Args:
        text: tokens so far.
        most: tokens to return; fewer where nothing matches.
        avoided: a token that must not come first.
    """
    for length in range(min(NGRAM_TOKENS, len(text) - 1), 0, -1):
        newest = list(text[-length:])
        for end in range(len(text) - 1, length - 1, -1):
            if list(text[end - length : end]) == newest and text[end] != avoided:
                followed = list(text[end : end + most])
                while len(followed) < most:
                    followed += followed[: most - len(followed)]
                return followed
    return []


def likeliest(draft: Sequence[Node], leaves: int) -> list[int]:
    """Return the positions whose second choices are likeliest to be right where a draft is not."""
    reached, odds = 1.0, []
    for node in draft:
        odds.append(reached * node.odds[1])
        reached *= node.odds[0]
    return sorted(range(len(draft)), key=lambda at: -odds[at])[:leaves]


def verified(
    choice: Choice, text: Sequence[int], right: Sequence[int], drafts: Any
) -> list[tuple[int, bool]]:
    """Return how many drafts each verification of an answer accepts, and whether a leaf as well.

    Args:
        choice: of what is verified.
        text: tokens of prompt and answer, up to the first one that drafts come behind.
        right: tokens behind it, as they are written.
        drafts: a model's own behind each token, from that one on, a list of nodes each.
    """
    found: list[tuple[int, bool]] = []
    done, most = 0, choice.drafts
    while done + most + 2 <= len(right):
        seen, following = [*text, *right[:done]], right[done:]
        own = drafts[done][:most] if choice.share else []
        stem = [node.token for node in own] if choice.share else looked_up(seen, most)
        accepted, leaf = accepted_tokens(stem, following), False
        if choice.branch:
            other = looked_up(seen, most, stem[0] if stem else None)
            accepted = max(accepted, accepted_tokens(other, following))
        elif accepted < most and accepted in likeliest(own, choice.leaves):
            leaf = own[accepted].second == following[accepted]
        found.append((accepted, leaf))
        done += 1 + accepted + leaf
    return found


def counted(verifications: Sequence[Sequence[int]], drafts: int) -> list[int]:
    """Return how many verifications there are, accepted drafts, rejections, and right leaves."""
    accepted = [number for number, _leaf in verifications]
    rejections = sum(number < drafts for number in accepted)
    return [len(accepted), sum(accepted), rejections, sum(leaf for _, leaf in verifications)]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table: tokens a verification by text, and what they gain over the drafts alone."""
    texts = [*dict.fromkeys(row["text"] for row in rows), "all"]
    head = ["drafts", "attend", "leaves", "branch", "rows", "right where rejected", *texts]
    lines = [_line(head), "|---|---|---:|---|---:|---:|" + "---:|" * len(texts)]
    for choice in CHOICES:
        _, _, rejected, right = map(sum, zip(*_places(rows, choice, "all"), strict=True))
        cells = [f"{choice.drafts} of {'itself' if choice.share else 'lookup'}"]
        cells += [f"1/{choice.share}" if choice.share else "", str(choice.leaves or "")]
        cells += ["lookup" if choice.branch else "", str(choice.rows)]
        cells.append(
            f"{right} of {rejected} ({right / max(rejected, 1):.0%})" if choice.leaves else ""
        )
        alone = Choice(share=choice.share, drafts=choice.drafts)
        for name in texts:
            own, before = (_tokens(_places(rows, each, name)) for each in (choice, alone))
            gain = f" ± {_error(own):.2f}" if choice == alone else _gain(own, before)
            cells.append(f"{statistics.fmean(own):.2f}{gain}")
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _places(rows: Sequence[dict[str, Any]], choice: Choice, text: str) -> list[Any]:
    """Return the counts of a choice, at each place of a text or of all."""
    own = [row for row in rows if all(row[key] == of for key, of in asdict(choice).items())]
    return [place for row in own if text in (row["text"], "all") for place in row["places"]]


def _tokens(places: Sequence[Any]) -> list[float]:
    """Return the tokens a verification at each place."""
    return [1 + (accepted + right) / count for count, accepted, _, right in places]


def _error(places: Sequence[float]) -> float:
    return statistics.stdev(places) / math.sqrt(len(places))


def _gain(places: Sequence[float], before: Sequence[float]) -> str:
    """Return what places gain over others on average, in percent, and its standard error."""
    base = statistics.fmean(before)
    gains = [a - b for a, b in zip(places, before, strict=True)]
    return f" ({statistics.fmean(gains) / base:+.1%} ± {_error(gains) / base:.1%})"


def rows_of(
    read: Read, name: str, ids: Sequence[int], given: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield a row for each choice: what is counted at each place of a text."""
    quarter = given.tokens // 4
    most = quarter - given.new_tokens - 1
    reaches = [given.tokens - quarter + at * most // given.starts for at in range(given.starts)]
    written, kv = read.continued(torch.tensor(reaches), given.new_tokens)
    found: dict[Choice, list[list[int]]] = {choice: [] for choice in CHOICES}
    for place, reach in enumerate(reaches):
        own_kv = [[part[place] for part in both] for both in kv]
        drafts = {
            share: read.drafted(given.tokens // share, reach, own_kv, written[place])
            for share in SHARES
        }
        first, *right = written[place].tolist()
        for choice, places in found.items():
            own = verified(choice, [*ids[:reach], first], right, drafts.get(choice.share))
            places.append(counted(own, choice.drafts))
    for choice, places in found.items():
        yield {"text": name} | asdict(choice) | {"places": places}


def parsed() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=8192, help="of a text")
    parser.add_argument("--starts", type=int, default=28, help="places in its last quarter")
    parser.add_argument("--new-tokens", type=int, default=64, help="at each place")
    parser.add_argument("--threads", type=int, default=None)
    add_options(parser, "text")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Measure each choice on each text."""
    given = parsed()
    model, tokenizer = loaded(given.model, given.threads)
    document = document_of(given)
    done = {row["text"] for row in document["rows"]}
    for name in TEXTS:
        if name in done:
            continue
        ids = first_tokens(tokenizer, text_of(name), given.tokens)
        read = Read(model, torch.tensor([ids]))
        document["rows"] += rows_of(read, name, ids, given)
        replace_json(given.json, document, remedy="make room, then give the command again")
        print(table(document["rows"]), flush=True)


if __name__ == "__main__":
    main()
