"""Long prompts pass through the model a chunk at a time (the paper's section 3.4).

Chunks are cut in front of the model's own forward, so that this holds for every way of generating.
Some of these ways do not look at transformers' `prefill_chunk_size`. What is not known to give the
same result in chunks passes as a whole.
"""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from headinfer.errors import MemoryPlanError, OptionError
from headinfer.integration.calls import CACHE_NAMES, new_shape, takes_argument
from headinfer.integration.crossing import Crossings
from headinfer.integration.positions import positions_to_give, positions_unknown
from headinfer.integration.recurrence import continues_state, has_state
from headinfer.units import format_tokens

_logger = logging.getLogger(__name__)

_SLICED = frozenset({"input_ids", "inputs_embeds", "token_type_ids", "cache_position"})
"""Arguments with one entry a new token, on axis 1 (`cache_position`: on its last axis)."""

_MODALITIES = frozenset({"mm_token_type_ids", "moe_mm_token_type_ids"})
"""Likewise, and 0 for tokens of text."""

_TYPES_OF_TEXT = frozenset({"gemma3"})
"""Models, by `model_type`, to which token types of 0 alone say the same as none."""

_WHOLE = frozenset({*CACHE_NAMES, "use_cache", "return_dict", "logits_to_keep", "tokenizer"})
"""Arguments that mean the same for every chunk."""


class Chunking:
    """A judge of which calls of one model may pass in chunks.

    Args:
        model: the attached model. A few short calls, with a cache of their own, may precede its
            first long one: they tell whether it continues a recurrent state.

    Attributes:
        crossings: where its calls go from device to device.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._continues: bool | None = None if has_state(model) else True
        self._weighs_passes = any(map(_weighs_passes, model.modules()))
        self._said: set[str] = set()
        self.crossings = Crossings(model)

    def drop_empty(self, arguments: dict[str, Any]) -> None:
        """Take out token types that tell of text alone.

        Some tokenizers return them with every text. A model that takes them would make a mask of
        images, and one that does not would hand them down to its attention.

        Raises:
            OptionError: they tell of more, to a model that takes none.
        """
        types = arguments.get("token_type_ids")
        if types is None:
            return
        taken = takes_argument(self._model, "token_type_ids")
        if taken and self._model.config.model_type not in _TYPES_OF_TEXT:
            return
        if not bool(types.any()):
            del arguments["token_type_ids"]
        elif not taken:
            raise OptionError(
                f"{type(self._model).__name__} takes no token_type_ids, and these are not all 0; "
                "leave them out of what the tokenizer returned"
            )

    def obstacle(
        self, forward: Callable[..., Any], arguments: dict[str, Any], past_tokens: int
    ) -> str | None:
        """Return why a call might give another result in chunks; None if it does not.

        Args:
            forward: the model's own.
            arguments: of the call, by name.
            past_tokens: tokens in the cache before the call.
        """
        decoder = self._model.config.get_text_config(decoder=True)
        multimodal = decoder is not self._model.config
        found = _obstacle(decoder, arguments, multimodal=multimodal)
        if found is None and self._weighs_passes:
            found = (
                "bitsandbytes chooses by all tokens of a pass which columns stay in 16 bits; "
                "quantised with llm_int8_threshold=0 none do"
            )
        if found is None and positions_unknown(self._model, arguments, past_tokens):
            found = "it was given no position_ids"
        if found is None and self._continues is None:
            self._continues = continues_state(self._model, forward, arguments)
        if found is None and not self._continues:
            return "its recurrent state does not go on from one pass of several tokens to the next"
        return found

    def with_positions(self, arguments: dict[str, Any], past_tokens: int) -> dict[str, Any]:
        """Return a call's arguments with positions, where chunks need to be given them."""
        positions = positions_to_give(self._model, arguments, past_tokens)
        return arguments if positions is None else {**arguments, "position_ids": positions}

    @contextlib.contextmanager
    def passing_whole(self, obstacle: str, new_tokens: int, chunk_tokens: int) -> Iterator[None]:
        """Say, once, that a call does not pass in chunks; also where its plan is refused.

        Args:
            obstacle: why it does not.
            new_tokens: tokens of the call.
            chunk_tokens: tokens of a chunk.
        """
        name = type(self._model).__name__
        try:
            yield
        except MemoryPlanError as error:
            raise MemoryPlanError(f"{error} ({name} takes no chunks: {obstacle})") from None
        if obstacle not in self._said:
            self._said.add(obstacle)
            _logger.warning(
                "%s takes %s tokens at once, not in chunks of %s, and the memory for that: %s",
                name,
                format_tokens(new_tokens),
                format_tokens(chunk_tokens),
                obstacle,
            )


def _weighs_passes(module: torch.nn.Module) -> bool:
    """Whether a module is of LLM.int8, whose results for a token depend on the others of a pass."""
    state: Any = getattr(module, "state", None)
    return type(state).__module__.startswith("bitsandbytes") and bool(state.threshold > 0)


def _obstacle(config: Any, arguments: dict[str, Any], *, multimodal: bool) -> str | None:
    """Return which argument of a call is not understood chunk by chunk, or None.

    Args:
        config: of the decoder; holds the defaults of some arguments.
        arguments: of the call, by name.
        multimodal: whether the model takes more than text.
    """
    for name in ("output_hidden_states", "output_router_logits"):
        if arguments.get(name) is None and getattr(config, name, False):
            return f"its config has {name}=True"
    if arguments.get("return_dict") is None and getattr(config, "return_dict", True) is False:
        return "its config has return_dict=False"
    unknown = [
        name
        for name, value in arguments.items()
        if not is_understood(name, value, multimodal=multimodal)
    ]
    return f"it was given {', '.join(unknown)}" if unknown else None


def is_understood(name: str, value: Any, *, multimodal: bool) -> bool:
    """Whether an argument means for chunks what it means for the whole."""
    if name == "return_dict":
        return value is not False
    if _is_empty(value):
        return True
    if name in _MODALITIES or (name == "token_type_ids" and multimodal):
        return not bool(value.any())  # tokens of an image may see each other
    if name == "attention_mask":
        return isinstance(value, torch.Tensor) and value.ndim == 2
    if name == "logits_to_keep":
        return not isinstance(value, torch.Tensor)
    return name in _SLICED or name in _WHOLE or name == "position_ids"


def _is_empty(value: Any) -> bool:
    """Whether a value says nothing, like the outputs of encoders that had nothing to encode."""
    if isinstance(value, dict):
        return all(_is_empty(part) for part in value.values())
    return value is None or value is False or (isinstance(value, list | tuple) and not value)


def chunk_end(new_tokens: int, chunk_tokens: int, keep: int) -> int:
    """Return how many tokens the next chunk has.

    Args:
        new_tokens: tokens of the call that are left.
        chunk_tokens: tokens of a chunk.
        keep: how many of the last positions must stay together in the last chunk.
    """
    left = new_tokens - chunk_tokens
    return new_tokens if left <= 0 or left < keep else chunk_tokens


def slice_call(arguments: dict[str, Any], start: int, end: int, past_tokens: int) -> dict[str, Any]:
    """Return a call's arguments for the new tokens from `start` to before `end` alone."""
    sliced = dict(arguments)
    for name, value in arguments.items():
        if value is None:
            continue
        if name in ("position_ids", "cache_position"):
            sliced[name] = value[..., start:end]
        elif name in _SLICED or name in _MODALITIES:
            sliced[name] = value[:, start:end]
        elif name == "attention_mask":
            sliced[name] = value[:, : past_tokens + end]
    return sliced


def run_leading_chunks(
    forward: Callable[..., Any],
    arguments: dict[str, Any],
    chunk_tokens: Callable[[], int],
    past_tokens: int,
    after_chunk: Callable[[int, int], None],
    crossings: Crossings,
    leaving: Callable[[], None],
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Run all chunks of a call but the last.

    Args:
        forward: the model's own.
        arguments: of the call, by name and with positions; `Chunking.obstacle` found none.
        chunk_tokens: tokens of the next chunk, asked before each: other caches may come meanwhile.
        past_tokens: tokens in the cache before the call.
        after_chunk: told the new tokens done so far and all, after each chunk.
        crossings: of the model.
        leaving: called when a device's part of a chunk is all enqueued.

    Returns:
        The arguments of the last chunk, and the logits of the chunks run, each `[batch, tokens,
        vocab]`, when the call asks for all logits; otherwise none.
    """
    shape = new_shape(arguments)
    assert shape is not None
    keeps = "logits_to_keep" in inspect.signature(forward).parameters
    keep = int(arguments.get("logits_to_keep") or 0) if keeps else 0
    start, new_tokens, logits = 0, shape[1], []
    while (end := start + chunk_end(new_tokens - start, chunk_tokens(), keep)) < new_tokens:
        part = slice_call(arguments, start, end, past_tokens)
        if keep:
            part["logits_to_keep"] = 1  # the least the model can compute; not used
        with crossings.once(discards=keep > 0, leaving=leaving):
            output = forward(**part)
        if not keep:
            logits.append(output.logits)
        after_chunk(end, new_tokens)
        start = end
    return slice_call(arguments, start, new_tokens, past_tokens), logits
