"""Scores of heads by copying: how often they look at the token that an answer copies.

This is the way of Wu et al. (2024). A query head hits a copied token of an answer if its largest
attention is where that token stands in the text. Its score is the share of such hits. The
highest score of query heads that share a KV head is that of the KV head. The answer is given, not
generated. So a model that answers wrongly shows its heads, too.
"""

import torch
from transformers import DynamicCache, PreTrainedModel

from headinfer.demo.evaluate import prefill
from headinfer.errors import OptionError
from headinfer.finding.attention import LayerCall, attending_by
from headinfer.finding.repetition import CHUNK_TOKENS
from headinfer.finding.shape import HeadShape, Rows
from headinfer.finding.texts import Copied, Texts
from headinfer.units import counted

_SHARE_OF_MEAN = 1e-3
"""Weight of the mean attention beside the share, for most heads have a share of 0."""


def copying_scores(
    model: PreTrainedModel, texts: Texts, tokens: int, seed: str, heads: HeadShape
) -> Rows:
    """Return each KV head's share of copied tokens that it looks at.

    Args:
        model: a causal language model of transformers, not attached.
        texts: where the example is from.
        tokens: the most tokens of the example.
        seed: of the example.
        heads: of the model.

    Raises:
        OptionError: all that is copied lies within the reach of a streaming head.
    """
    example = texts.example(tokens, seed)
    copied = example.beyond(heads.sink_tokens, heads.recent_tokens)
    if not copied:
        raise OptionError(
            f"a text of {counted(tokens, 'token')} hides nothing beyond "
            f"{counted(heads.sink_tokens, 'sink')} and "
            f"{counted(heads.recent_tokens, 'recent token')}; give more with --tokens"
        )
    # The token before the first copied one predicts it, and so looks for it.
    start = copied[0].at - 1
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        prefill(model, example.ids[:start], cache, chunk_tokens=CHUNK_TOKENS)
        watch = _Watch(heads, copied)
        with attending_by(model, watch.attend):
            prefill(model, example.ids[start : copied[-1].at], cache)
    return heads.rows(watch.scores)


class _Watch:
    """A watch on where the queries that predict copied tokens look."""

    def __init__(self, heads: HeadShape, copied: tuple[Copied, ...]) -> None:
        self._layers = frozenset(heads.layers)
        self._copied = copied
        self.scores: dict[int, list[float]] = {}

    def attend(self, call: LayerCall) -> torch.Tensor:
        if call.layer not in self._layers:
            return call.attend()
        q_len, kv_len = call.query.shape[3], call.keys.shape[2]
        sources = torch.zeros(q_len, kv_len, device=call.keys.device)
        for token in self._copied:
            sources[token.at - 1 - (kv_len - q_len), list(token.sources)] = 1
        found, parts = torch.zeros(call.query.shape[1:3]), []
        for rows in call.blocks:
            weights = call.weights(rows)
            parts.append(call.attended(weights))
            wanted = sources[rows].expand(weights.shape)
            hits = wanted.gather(-1, weights.argmax(-1, keepdim=True)).sum((0, 3, 4))
            mean = (weights * wanted).sum((0, 3, 4))
            found += (hits + _SHARE_OF_MEAN * mean).cpu()
        self.scores[call.layer] = (found.amax(-1) / len(self._copied)).tolist()
        return torch.cat(parts, -2)
