"""One attention layer of ours, as transformers sees it."""

from typing import Any, NoReturn

import torch
from transformers.cache_utils import CacheLayerMixin

from headinfer.engine.readout import Part
from headinfer.errors import CacheStateError
from headinfer.integration.rows import chosen_rows
from headinfer.integration.state import OffloadedState
from headinfer.integration.turns import in_turn
from headinfer.units import counted


class OffloadedLayer(CacheLayerMixin):
    """An attention layer of an `OffloadedCache`.

    `keys` and `values` are copies, made whenever they are asked for: writing to one does not change
    the cache. Nothing on the way of a model's call may look at them. The number of rows changes for
    all layers at once, by the cache.

    Args:
        state: the cache's engine.
        layer_idx: which layer, counted among those that attend.
        window_tokens: tokens that a query sees, its own included; None for all.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, state: OffloadedState, layer_idx: int, window_tokens: int | None) -> None:
        self.turns = state.turns  # taken by whatever changes the layer
        self._state = state
        self._layer_idx = layer_idx
        self._window_tokens = window_tokens
        super().__init__()

    @property
    def keys(self) -> torch.Tensor | None:
        """A copy of the keys, `[batch, kv_heads, tokens, key_dim]` on the model's device.

        None before the first tokens came.

        Raises:
            CacheStateError: the cache was closed, or is being updated.
            MemoryPlanError: there is no memory for it.
        """
        return self._read("keys")

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._refuse_to_set("keys", keys)

    @property
    def values(self) -> torch.Tensor | None:
        """A copy of the values, `[batch, kv_heads, tokens, value_dim]`; see `keys`."""
        return self._read("values")

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._refuse_to_set("values", values)

    @property
    def is_initialized(self) -> bool:
        """Whether tokens came, or `lazy_initialization` was called."""
        return self._initialized or self.get_seq_length() > 0

    @is_initialized.setter
    def is_initialized(self, initialized: bool) -> None:
        self._initialized = initialized

    def _read(self, part: Part) -> torch.Tensor | None:
        read = self._state.read(self._layer_idx, part)
        if read is None and self.is_initialized:
            return torch.empty(0, dtype=self.dtype, device=self.device)
        return read if self.is_initialized else None

    def _refuse_to_set(self, name: str, value: torch.Tensor | None) -> None:
        # Without an engine there are none: transformers sets both as each layer is made.
        if value is not None or (self._state.engine is not None and self.get_seq_length()):
            raise CacheStateError(
                f"the {name} of an offloaded layer cannot be set; pass tokens through the model, "
                "or use crop() or reset()"
            )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Note where tokens will come from; the engine is made when they come."""
        self.device, self.dtype = key_states.device, key_states.dtype
        self.is_initialized = True

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's, and it keeps the types
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new tokens; returns them alone, for the attention function to find the rest."""
        taken = self._state.update(
            self._layer_idx, key_states, value_states, self._window_tokens, self.turns.mine
        )
        if not self._initialized:
            self.device, self.dtype = key_states.device, key_states.dtype
            self._initialized = True
        return taken

    def get_seq_length(self) -> int:
        """Return the tokens held."""
        return self._state.tokens(self._layer_idx)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys a mask covers and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    @in_turn
    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what `crop` would refuse because of a window, with nothing changed."""
        if self._state.engine is not None:
            self._state.engine.check_crop(self._layer_idx, -tokens_to_remove)

    @in_turn
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens.

        Raises:
            CacheStateError: the cache was closed, or a window has dropped the tokens before.
            ValueError: a positive number, which older transformers took as the length to keep.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the tokens to remove, not {tokens_to_remove}")
        self._state.check_open()
        if self._state.engine is not None and tokens_to_remove:
            self._state.engine.crop(self._layer_idx, -tokens_to_remove)

    @in_turn
    def select(self, rows: list[int]) -> None:
        """Make row `i` what row `rows[i]` was, for as many rows as there are."""
        if self.get_seq_length():
            assert self._state.engine is not None
            self._state.engine.select(self._layer_idx, rows)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Rearrange the rows for beam search."""
        self.batch_select_indices(beam_idx)

    @in_turn
    def batch_select_indices(self, indices: Any) -> None:
        """Rearrange the rows.

        Raises:
            CacheStateError: they would become more or fewer.
        """
        if not self.get_seq_length():
            return
        assert self._state.engine is not None
        batch = self._state.engine.plan.batch
        rows = chosen_rows(indices, batch).tolist()
        if len(rows) != batch:
            raise CacheStateError(
                f"an offloaded layer of {counted(batch, 'row')} cannot become one of {len(rows)} "
                "by itself; call the cache's own method"
            )
        self.select(rows)

    @in_turn
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row once: more is for the cache to do."""
        if self.get_seq_length():
            assert self._state.engine is not None
            batch = self._state.engine.plan.batch
            self.batch_select_indices([row for row in range(batch) for _ in range(repeats)])

    @in_turn
    def reset(self) -> None:
        """Forget all tokens; the first offloaded layer does it for all."""
        self._state.check_open()
        self.is_initialized = False
        if self._layer_idx == 0 and self._state.engine is not None:
            self._state.engine.clear()

    def copy_form_of(self, other: "OffloadedLayer") -> None:
        """Be initialised as another layer is, whose tokens are here already."""
        if other._initialized:
            self.device, self.dtype = other.device, other.dtype
            self.is_initialized = True

    def note_loaded(self, device: torch.device, dtype: torch.dtype) -> None:
        """Be initialised for tokens that were loaded and are here already."""
        self.device, self.dtype = device, dtype
        self.is_initialized = True

    def offload(self) -> None:
        """Do nothing: the layer is offloaded by its own means."""

    def prefetch(self) -> None:
        """Do nothing: the layer is prefetched by its own means."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse: an engine serves all layers of a cache."""
        raise CacheStateError(
            "an offloaded layer cannot be copied by itself; use copy.deepcopy(cache)"
        )

    def __copy__(self) -> NoReturn:
        """Refuse: an engine serves all layers of a cache."""
        self.__deepcopy__({})

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        """Refuse to be pickled."""
        raise CacheStateError(
            "an offloaded layer cannot be pickled; save copies of keys and values"
        )


class WindowLayer(OffloadedLayer):
    """A layer that sees a window of recent tokens, all of them on the device.

    Unlike transformers' own it can take back some tokens whether or not it was told to record them.

    Args:
        state: the cache's engine.
        layer_idx: which layer, counted among those that attend.
        window_tokens: tokens that a query sees, its own included.

    Attributes:
        sliding_window: the window's tokens, under transformers' name.
        record_past: whether it was told to record; it does so in any case.
    """

    is_sliding = True

    def __init__(self, state: OffloadedState, layer_idx: int, window_tokens: int) -> None:
        super().__init__(state, layer_idx, window_tokens)
        self.sliding_window = window_tokens
        self.record_past = False
        # What iterating over a cache gives beside keys and values.
        self._sliding_window_tensor = torch.tensor(window_tokens, dtype=torch.long)

    @property
    def cumulative_length(self) -> int:
        """Tokens that came, as `get_seq_length` returns."""
        return self.get_seq_length()

    def activate_past_recording(self) -> None:
        """Note that drafts may come."""
        self.record_past = True

    def copy_form_of(self, other: OffloadedLayer) -> None:
        """Be initialised as another window is, whose tokens are here already."""
        super().copy_form_of(other)
        assert isinstance(other, WindowLayer)
        self.record_past = other.record_past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the keys a mask covers and the first of them."""
        tokens = self.get_seq_length()
        first = max(tokens - self.sliding_window + 1, 0)
        return tokens - first + query_length, first

    def get_max_length(self) -> int:
        """Return the tokens of the window."""
        return self.sliding_window
