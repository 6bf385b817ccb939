"""Log-likelihoods of continuations, with the context read once and never all its logits held."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from headinfer.errors import CacheStateError
from headinfer.evaluate.reading import most_tokens
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.calls import cache_argument

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True)
class Score:
    """A judgement of one continuation.

    Attributes:
        loglikelihood: natural logarithm of its probability after the context.
        is_greedy: whether each of its tokens is the likeliest one.
    """

    loglikelihood: float
    is_greedy: bool

    def __add__(self, later: "Score") -> "Score":
        """Return the score of two parts, one after the other."""
        return Score(self.loglikelihood + later.loglikelihood, self.is_greedy and later.is_greedy)


class Reader(Protocol):
    """A model that reads through caches, under whatever method is in force.

    Attributes:
        model: in eval mode.
    """

    model: PreTrainedModel

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache for up to so many tokens of a row."""

    def prefill(self, tokens: Tokens, cache: Cache) -> torch.Tensor:
        """Pass tokens through the model; return the last logits `[vocab]`."""


@torch.no_grad()
def score_after(reader: Reader, context: Tokens, continuations: Sequence[Tokens]) -> list[Score]:
    """Score several continuations of one context, which passes through the model once.

    Between two continuations the cache goes back to the end of the context. Where it cannot go
    back, as with full sliding windows or quantised layers, the context is read again.

    Args:
        reader: of the model.
        context: at least one token.
        continuations: at least one token each.
    """
    longest = max(map(len, continuations))
    cache = reader.new_cache(len(context) + longest)
    first = reader.prefill(context, cache)
    scores = []
    is_moved = False
    for continuation in continuations:
        score = _score(first[None], continuation[:1])
        if len(continuation) > 1:
            if is_moved and not _goes_back(cache, len(context)):
                if isinstance(cache, OffloadedCache):
                    cache.close()
                del cache  # first: its memory is wanted
                cache = reader.new_cache(len(context) + longest)
                reader.prefill(context, cache)
            for rows, predicted in _following(reader.model, cache, continuation):
                score += _score(rows, predicted)
            is_moved = True
        scores.append(score)
    return scores


@torch.no_grad()
def score_batch(reader: Reader, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[Score]:
    """Score pairs of a context and a continuation in one pass.

    Shorter rows are filled up at their ends, and no token sees what comes after it. A row's result
    depends on the others only where rotary frequencies follow the length of a call.

    Args:
        reader: of the model.
        pairs: of at least one token each.
    """
    rows = [[*context, *continuation][:-1] for context, continuation in pairs]
    longest = max(map(len, rows))
    kept = max(longest - len(row) + len(pair[1]) for row, pair in zip(rows, pairs, strict=True))
    model = reader.model
    if kept * len(rows) > most_tokens(model):
        return [score_after(reader, context, [rest])[0] for context, rest in pairs]
    filled = [row + [0] * (longest - len(row)) for row in rows]
    logits = model(
        input_ids=torch.tensor(filled, device=model.device),
        use_cache=True,
        logits_to_keep=kept,
        **cache_argument(model, reader.new_cache(longest)),
    ).logits
    scores = []
    for row, (_, continuation), of_row in zip(rows, pairs, logits, strict=True):
        end = of_row.shape[0] - (longest - len(row))
        scores.append(_score(of_row[end - len(continuation) : end], continuation))
    return scores


def _following(
    model: PreTrainedModel, cache: Cache, continuation: Tokens
) -> Iterator[tuple[torch.Tensor, Tokens]]:
    """Yield logits `[tokens, vocab]` with the tokens they predict, all but the first one."""
    step = most_tokens(model)
    for start in range(0, len(continuation) - 1, step):
        end = min(start + step, len(continuation) - 1)
        output = model(
            input_ids=torch.tensor([continuation[start:end]], device=model.device),
            use_cache=True,
            **cache_argument(model, cache),
        )
        yield output.logits[0], continuation[start + 1 : end + 1]


def _goes_back(cache: Cache, tokens: int) -> bool:
    """Take a cache back to its first tokens; return whether that could be done."""
    if not isinstance(cache, OffloadedCache) and not all(map(_drops, cache.layers)):
        return False
    try:
        cache.crop(tokens - cache.get_seq_length())
    except (CacheStateError, RuntimeError, ValueError):
        return False
    return True


def _drops(layer: object) -> bool:
    """Whether a layer of transformers drops its newest tokens, or says that it cannot."""
    # Others inherit a `crop` that leaves their quantised or recurrent part as it was.
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def _score(logits: torch.Tensor, tokens: Tokens) -> Score:
    """Score tokens by the logits `[tokens, vocab]` that predict them."""
    wanted = torch.tensor(tokens, device=logits.device)
    # In float32 whatever the model's dtype: sums of 16-bit logarithms would lose all digits.
    chosen = logits.float().log_softmax(-1).gather(-1, wanted[:, None])
    return Score(float(chosen.sum()), bool((logits.argmax(-1) == wanted).all()))
