"""The cache a user passes to the model: transformers' own, with attention layers of ours in it."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from headinfer.engine.stats import Stats
from headinfer.errors import CacheStateError
from headinfer.integration.cache_host import CacheHost
from headinfer.integration.calls import cache_name
from headinfer.integration.copying import copied
from headinfer.integration.drafting import DraftableCache
from headinfer.integration.layer import OffloadedLayer, WindowLayer
from headinfer.integration.memory_held import described
from headinfer.integration.prefix import keep_common_prefix, prompt_ids
from headinfer.integration.row_selection import rows_of, select
from headinfer.integration.rows import chosen_rows
from headinfer.integration.saved_pages import SavedPages
from headinfer.integration.saving import BLOCK_BYTES, SavedSession, save_cache
from headinfer.integration.state import OffloadedState
from headinfer.integration.support import layer_kind
from headinfer.integration.token_history import TokenHistory
from headinfer.integration.turns import in_turn
from headinfer.integration.watchers import Watcher
from headinfer.plan.shape import LayerKind
from headinfer.saved.messages import Messages
from headinfer.units import parse_bytes

PrefillProgress = Callable[[int, int], None]
"""Told the tokens done and the tokens in all of a prompt, after each chunk."""


class OffloadedCache(DraftableCache):
    """A transformers cache whose attention layers are attended tile by tile, from CPU memory.

    Windows stay in GPU memory; the states of linear attention are transformers' own. Made by
    `Offload.new_cache`; valid for one conversation at a time, on the model it was made for.

    Iterating over it gives copies of the keys and values of one layer after another, on the model's
    device. What is written to them does not reach the cache. `copy.deepcopy` makes a second cache
    of the same attachment, which then goes on by itself.

    Args:
        model: gives the layers.
        host: the attachment.
        max_tokens: tokens to reserve CPU memory for; None to go by the prompts.

    Attributes:
        stats: times and memory of the calls with this cache; copies are counted for all caches of
            an attachment together.
        drafted_tokens: new tokens of the last call that may be rejected drafts, in each row.
        progress: told of the tokens done and in all after each chunk of a prompt; may raise.
        history: the token ids that came.
        marks: positions where a chunk of a prompt ends, wherever else it would.
        watchers: told of the model's calls with it.
        saved: what of it is on the disk, and where; None for nothing.
        rounded: the form in which tokens that were loaded had been rounded; None for none.
    """

    def __init__(self, model: PreTrainedModel, host: CacheHost, max_tokens: int | None) -> None:
        super().__init__(model.config)
        self._config = model.config
        self._name = cache_name(model)
        self.state = OffloadedState(host, max_tokens)
        self.stats = Stats()
        self.drafted_tokens = 0
        self.progress: PrefillProgress | None = None
        self.history = TokenHistory()
        self.marks: tuple[int, ...] = ()
        self.watchers: list[Watcher] = []
        self.saved: SavedPages | None = None
        self.rounded: str | None = None
        layer_idx = 0
        for position, layer in enumerate(self.layers):
            kind = layer_kind(layer)
            if kind is LayerKind.SLIDING:
                window_tokens: int = layer.sliding_window
                self.layers[position] = WindowLayer(self.state, layer_idx, window_tokens)
            elif kind is LayerKind.FULL:
                self.layers[position] = OffloadedLayer(self.state, layer_idx, None)
            layer_idx += kind is not LayerKind.STATE
        self._attention_layers = layer_idx

    def as_keyword(self) -> dict[str, "OffloadedCache"]:
        """Return the cache as a keyword argument of the model's `generate`, and of the model.

        Its name is the one that the installed transformers has: `cache` since 5.24, and
        `past_key_values` before, which 5.24 takes with a warning.
        """
        return {self._name: self}

    @in_turn
    def reset(self) -> None:
        """Forget all tokens.

        Raises:
            Exception: what the host's attention failed with, and nobody heard of; after all else.
        """
        self.state.check_open()
        engine = self.state.engine
        if engine is not None:
            engine.check_no_drafts()
        interrupted = engine is not None and engine.interrupted
        if engine is not None:
            engine.half_done = True  # until `clear` is done
        # Made anew, because older transformers zero a window and then go on behind the zeros.
        fresh = DynamicCache(config=self._config).layers
        for position, layer in enumerate(self.layers):
            if not isinstance(layer, OffloadedLayer):
                self.layers[position] = fresh[position]
        self.history.clear()
        self.saved = self.rounded = None
        for layer in self._offloaded_layers():
            layer.is_initialized = False
        try:
            if interrupted:
                self.state.drop_engine()
            elif engine is not None:
                engine.clear()
        finally:
            self.lengths_before = None

    @in_turn
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens of every layer.

        Raises:
            CacheStateError: the cache was closed, or a window has dropped the tokens before those.
            ValueError: a positive number, which older transformers took as the length to keep.
            RuntimeError: from a layer of transformers' own that cannot go back.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the tokens to remove, not {tokens_to_remove}")
        self.state.check_open()
        # Those that may refuse come first, so that nothing has changed then.
        for layer in self._offloaded_layers():
            layer.check_crop(tokens_to_remove)
        if self.state.engine is not None:
            self.state.engine.settle_writes()
        for layer in self._own_layers():
            layer.crop(tokens_to_remove)
        with self.state.changing():
            for layer in self._offloaded_layers():
                layer.crop(tokens_to_remove)
        self.history.crop(-tokens_to_remove)
        if self.saved is not None:
            self.saved = self.saved.cropped(self.get_seq_length())
        self._discount(-tokens_to_remove)

    def _discount(self, tokens: int) -> None:
        """Count drafts that are taken back as never decoded: they were rejected."""
        rejected = min(tokens, self.drafted_tokens)
        self.drafted_tokens -= rejected
        for stats in (self.stats, self.state.host.stats):
            stats.decode_tokens -= rejected * (self._batch() or 0)

    @in_turn
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row.

        Raises:
            ValueError: not once or more.
            MemoryPlanError: the GPU memory or the CPU memory is too small for so many rows.
        """
        if repeats < 1:
            raise ValueError(f"rows are repeated once or more, not {repeats} times")
        batch = self._batch()
        if batch is not None:
            select(self, torch.arange(batch, device="cpu").repeat_interleave(repeats), batch)

    @in_turn
    def batch_select_indices(self, indices: Any) -> None:
        """Keep some rows, in the order given.

        Args:
            indices: numbers of rows, also from the end, or a mask, in a tensor or any sequence.

        Raises:
            IndexError: there is no such row.
            ValueError: not a list of rows, or none is chosen.
            MemoryPlanError: the GPU memory or the CPU memory is too small for so many rows.
        """
        batch = self._batch()
        if batch is not None:
            select(self, chosen_rows(indices, batch), batch)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Make row `i` what row `beam_idx[i]` was, for beam search."""
        self.batch_select_indices(beam_idx)

    def _batch(self) -> int | None:
        """Return the rows held; None before the first tokens."""
        self.state.check_open()
        if self.state.engine is not None:
            return self.state.engine.plan.batch
        return rows_of(self._own_layers())

    @property
    def token_ids(self) -> torch.Tensor | None:
        """The tokens it holds, `[rows, tokens]` on the CPU; None where not all are known."""
        return self.history.ids(self._batch() or 0, self.get_seq_length())

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        block_bytes: str | int = BLOCK_BYTES,
        messages: Messages | None = None,
    ) -> SavedSession:
        """Write all that the cache holds to a folder, for `Offload.load_cache`.

        A session that is there stays as it is until the new one is whole. Pages that this cache, or
        one that it was forked or loaded from, has written there are not written again. Calls of the
        model go on meanwhile where the cache is parked, and wait otherwise.

        Args:
            path: of the folder, which is made; or a session's, which is replaced.
            block_bytes: the most bytes of one file, for example "64MiB". What is damaged later
                costs the tokens from its file on.
            messages: of the conversation that was read; where that fails, both stay as they were.
                By default messages that are there stay.

        Returns:
            What was written.

        Raises:
            SessionFileError: it cannot be written there; what was there is whole.
            CacheStateError: the cache is empty, was closed, or a call with it was interrupted.
            OptionError: `block_bytes` is no size.
            UnsupportedModelError: the model is split over several devices or processes.
        """
        block = parse_bytes(block_bytes, "block_bytes")
        if self.state.parked:  # nothing is in flight, and nobody writes to what others share
            return self._save(path, block, messages)
        return self.turns.run(self._save, path, block, messages)

    def _save(
        self, path: str | os.PathLike[str], block_bytes: int, messages: Messages | None
    ) -> SavedSession:
        model, engine = self.state.host.fingerprint(), self.state.check_savable()
        self.check_whole()
        said = None if messages is None else messages.as_bytes()
        return save_cache(self, engine, model, path, block_bytes, said)

    @in_turn
    def keep_common_prefix(self, ids: Sequence[int] | torch.Tensor) -> int:
        """Keep what a prompt begins with, so that only the rest of it has to be read.

        A model that cannot go back, having windows or states, keeps nothing then. The prompt's last
        token is not kept, as something must be read.

        Args:
            ids: the prompt of the one row, to be passed to the model with this cache.

        Returns:
            The tokens kept.

        Raises:
            CacheStateError: the cache holds several rows, or was closed.
            OptionError: it is no prompt's token ids.
        """
        return keep_common_prefix(self, prompt_ids(ids))

    def _own_layers(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, OffloadedLayer)]

    def _offloaded_layers(self) -> list[OffloadedLayer]:
        return [layer for layer in self.layers if isinstance(layer, OffloadedLayer)]

    @in_turn
    def __deepcopy__(self, memo: dict[int, Any]) -> "OffloadedCache":
        """Return a second cache of the same attachment that holds the same tokens.

        It takes GPU memory as any new cache does. The two share CPU memory until one of them
        changes what both hold.

        Raises:
            CacheStateError: it was closed, the model was detached, or a call was interrupted.
            MemoryPlanError: the GPU memory or the CPU memory is too small for a second cache.
        """
        return copied(self, memo, parked=False)

    def __copy__(self) -> NoReturn:
        """Refuse: two caches would share layers, and one would not hear of the other's tokens.

        Raises:
            CacheStateError: always.
        """
        raise CacheStateError(
            "copy.copy() of an offloaded cache would share its memory; use copy.deepcopy(cache)"
        )

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        """Refuse to be pickled, or sent to another process; `save` is there for that.

        Raises:
            CacheStateError: always.
        """
        raise CacheStateError(
            "an offloaded cache cannot be pickled; use cache.save() and offload.load_cache()"
        )

    def __repr__(self) -> str:
        """Return what it holds in one line, without waiting for a call that is under way."""
        return f"{type(self).__name__}({described(self)})"

    def close(self) -> None:
        """Free its memory now; the cache cannot be used any more."""
        self.state.close()
