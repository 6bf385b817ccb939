"""Scores of heads by repetition: what they look at while a model reads a text a second time.

This is KVzip's way (Kim et al., 2025). A token's score is the largest attention that it gets from
the repetition, and a head's score is that of its best token. We differ in two things. Tokens that a
streaming head sees do not count, and attention is that among all tokens, not among some.
"""

import copy

import torch
from transformers import DynamicCache, PreTrainedModel

from headinfer.demo.evaluate import prefill
from headinfer.finding.attention import LayerCall, attending_by
from headinfer.finding.masked import within_reach
from headinfer.finding.shape import HeadShape, Rows
from headinfer.finding.texts import Texts

CHUNK_TOKENS = 1024
"""Tokens of a text that are repeated in one pass."""

_LEAD_TOKENS = 8
"""Tokens before those of a chunk that say where the repetition is."""


def repetition_scores(
    model: PreTrainedModel, texts: Texts, tokens: int, seed: str, heads: HeadShape
) -> Rows:
    """Return each KV head's largest attention to a text from its repetition.

    Args:
        model: a causal language model of transformers, not attached.
        texts: where the text is from.
        tokens: the most tokens of the text.
        seed: of the text.
        heads: of the model.
    """
    ids = texts.text(tokens, seed)
    best = {layer: torch.zeros(heads.kv_heads[layer]) for layer in heads.layers}
    with torch.inference_mode():
        read = DynamicCache(config=model.config)
        prefill(model, ids, read, chunk_tokens=CHUNK_TOKENS)
        for start in range(0, len(ids), CHUNK_TOKENS):
            chunk = range(start, min(start + CHUNK_TOKENS, len(ids)))
            watch = _Watch(heads, chunk, best)
            repeated = [*texts.again, *ids[max(start - _LEAD_TOKENS, 0) : chunk.stop]]
            with attending_by(model, watch.attend):
                # A copy, for windows that are full cannot go back to where the text ended.
                prefill(model, repeated, copy.deepcopy(read))
    return heads.rows({layer: scores.tolist() for layer, scores in best.items()})


class _Watch:
    """A watch on the attention of a repetition to the tokens that it repeats."""

    def __init__(self, heads: HeadShape, chunk: range, best: dict[int, torch.Tensor]) -> None:
        self._heads = heads
        self._chunk = slice(chunk.start, chunk.stop)
        self._best = best

    def attend(self, call: LayerCall) -> torch.Tensor:
        if call.layer not in self._best:
            return call.attend()
        parts = []
        for rows in call.blocks:
            weights = call.weights(rows)
            parts.append(call.attended(weights))
            near = within_reach(call, rows, self._heads.sink_tokens, self._heads.recent_tokens)
            far = weights[..., self._chunk].masked_fill(near[:, self._chunk], 0.0)
            largest = far.amax((0, 2, 3, 4)).cpu()
            self._best[call.layer] = torch.maximum(self._best[call.layer], largest)
        return torch.cat(parts, -2)
