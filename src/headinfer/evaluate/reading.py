"""A text read by a model through one cache, with the logits of every position, part by part."""

import copy
import itertools
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headinfer.errors import ModelLoadError, UnsupportedModelError
from headinfer.integration.calls import cache_argument
from headinfer.integration.chunking import Chunking
from headinfer.integration.rotary import rotary_modules_by_length

LOGITS_BYTES = 512 * 2**20
"""The most that the logits of one pass take, counted in float32.

No reading holds more logits than those of one pass, however long the text is.
"""


def sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a second instance of a model, with modules and configs of its own.

    Its parameters and buffers are the first one's. So both read in turns, the one attached and the
    other stock, and the weights take no memory twice. Quantised weights are copied, for their
    modules pack them when they are first used.
    """
    if getattr(model, "is_quantized", False):
        return copy.deepcopy(model)
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def most_tokens(model: PreTrainedModel) -> int:
    """Return the most tokens of a pass through a model, so that logits stay within their bytes."""
    vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
    return max(1, LOGITS_BYTES // (vocab_size * torch.float32.itemsize))


def check_text(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Check that a text is the model's, and may pass in several calls with the result of one.

    Args:
        model: with its own forward; a few short calls may be made.
        tokens: of the text, `[1, tokens]`.

    Raises:
        ModelLoadError: the tokenizer has tokens that the model lacks.
        UnsupportedModelError: stock itself would give another result in several calls.
    """
    most, known = int(tokens.max()), model.get_input_embeddings().weight.shape[0]
    if most >= known:
        raise ModelLoadError(
            f"the tokenizer reads token {most} in the text, and the model knows {known}; give a "
            "text in its words, or the model's own tokenizer"
        )
    reason = Chunking(model).obstacle(model.forward, {"input_ids": tokens}, 0)
    if rotary_modules_by_length(model):
        reason = "its rotary frequencies follow the length of a call"
    if reason:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot read a text in several calls: {reason}"
        )


def read(
    model: PreTrainedModel, cache: Cache, tokens: torch.Tensor, pass_tokens: int
) -> Iterator[torch.Tensor]:
    """Pass a text through a model; yield the logits of each pass, `[tokens of it, vocab]`.

    Args:
        model: stock, or attached and given a cache of its attachment.
        cache: an empty one.
        tokens: of the text, `[1, tokens]`.
        pass_tokens: tokens of a pass. The last one takes what is left.
    """
    for part in tokens.split(pass_tokens, dim=1):
        output = model(input_ids=part, use_cache=True, **cache_argument(model, cache))
        logits: torch.Tensor = output.logits[0]
        del output  # its logits are another name for what the reader lets go
        yield logits


def aligned(readings: Sequence[Iterator[torch.Tensor]]) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the logits that several readings have for the same positions.

    Readings may have passes of different sizes. A part ends wherever a pass of any of them does.

    Args:
        readings: of one text, in step; each goes on when its last pass is used up.
    """
    pending: list[torch.Tensor] = []
    for reading in readings:
        pending.append(next(reading))
    while True:
        rows = min(map(len, pending))
        yield tuple(part[:rows] for part in pending)
        pending = [part[rows:] for part in pending]
        for number, reading in enumerate(readings):
            if not len(pending[number]):
                pending[number] = pending[number].new_empty(0)  # lets go of the pass before
                following = next(reading, None)
                if following is None:
                    assert not any(map(len, pending)), "the readings are of different lengths"
                    return
                pending[number] = following
