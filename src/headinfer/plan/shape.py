"""What the planner needs to know of a model: its layers' KV shapes and its widths."""

import collections
import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from headinfer.plan.format import Format, can_pack


class LayerKind(enum.Enum):
    """How a decoder layer keeps its past."""

    FULL = "full"
    """Every past token: offloaded by HeadInfer."""

    SLIDING = "sliding"
    """A window of recent tokens: kept on the device."""

    STATE = "state"
    """No KV cache at all (linear attention, or no attention): left to transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingHeads:
    """A choice of KV heads of a full layer that see sinks and a window alone; approximate.

    Attributes:
        heads: indices of the KV heads, ascending.
        sink_tokens: the oldest tokens, which they see besides; 0 for none.
        recent_tokens: the newest tokens that they see, the query's own included.
    """

    heads: tuple[int, ...]
    sink_tokens: int
    recent_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """A layer's shape: the KV cache of one decoder layer, or of its heads that see equally far.

    Attributes:
        kind: how the layer keeps its past.
        kv_heads: number of key/value heads; 0 for `LayerKind.STATE`.
        key_dim: elements of one head's key.
        value_dim: elements of one head's value.
        window_tokens: tokens a sliding layer sees, itself included; 0 for other kinds.
        sink_tokens: the oldest tokens that a sliding layer sees besides.
        streaming: heads of a full layer that are treated as a sliding layer's; None for none.
        host_format: the form of its tokens in host memory.
    """

    kind: LayerKind
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window_tokens: int = 0
    sink_tokens: int = 0
    streaming: StreamingHeads | None = None
    host_format: Format = Format.DENSE

    @property
    def tracks(self) -> tuple["LayerShape", ...]:
        """The layer's heads by how far back they see: the full ones before those that stream."""
        streaming = self.streaming
        if streaming is None or not streaming.heads:
            return (self,)
        window = replace(
            self,
            kind=LayerKind.SLIDING,
            kv_heads=len(streaming.heads),
            window_tokens=streaming.recent_tokens,
            sink_tokens=streaming.sink_tokens,
            streaming=None,
            host_format=Format.DENSE,
        )
        full_heads = self.kv_heads - window.kv_heads
        if not full_heads:
            return (window,)
        return replace(self, kv_heads=full_heads, streaming=None), window

    @property
    def elements_per_token(self) -> int:
        """Elements of keys and values that one token adds to this layer."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    def host_bytes(self, tokens: int, itemsize: int, heads: int | None = None) -> int:
        """Bytes of some tokens in host memory, by whole rows of their form.

        Args:
            tokens: how many, of one sequence.
            itemsize: bytes of an element as it is computed.
            heads: of how many heads, at most all; None for all.
        """
        form = self.host_format
        row = form.row_bytes(self.key_dim, itemsize) + form.row_bytes(self.value_dim, itemsize)
        heads = self.kv_heads if heads is None else min(heads, self.kv_heads)
        return heads * form.rows(tokens) * row


@dataclass(frozen=True, kw_only=True)  # without slots, where a cached property has no place
class ModelShape:
    """A decoder-only model as the planner sees it.

    Attributes:
        name: for messages.
        layers: one entry per decoder layer, in order.
        query_heads: query heads of an attention layer.
        hidden_size: width of the residual stream.
        mlp_width: intermediate elements a token occupies in one MLP (all active experts).
        mlp_peak_elements: elements a token occupies at the peak of one MLP; 0 where gate, up and
            their product are apart, which is three times `mlp_width`.
        computed_itemsize: bytes of an element of what the model computes, where KV is kept in
            another dtype; 0 where it is not.
        vocab_size: width of the logits.
        weights_bytes: bytes of all parameters and buffers as loaded.
        kv_itemsize: bytes of one KV element.
        max_positions: tokens the position encoding was made for; 0 when unknown.
        ranks: processes that the heads are split over; all else is then of one of them.
        uneven: whether all heads of one of these processes stream, and not those of another.
        embedding_bytes: of the weights, the embedding's.
        output_bytes: of the weights, the output matrix's; 0 where the embedding is that, too.
        splits_heads: whether transformers can split the heads over processes.
        brought_bytes: weights beside `weights_bytes` that lie elsewhere, and are brought to the
            device whenever tokens pass.
        disk_bytes: of these, what is read from a disk each time.
        stage: devices that a chunk passes before it comes to these layers.
    """

    name: str
    layers: tuple[LayerShape, ...]
    query_heads: int
    hidden_size: int
    mlp_width: int
    vocab_size: int
    weights_bytes: int
    kv_itemsize: int
    max_positions: int
    mlp_peak_elements: int = 0
    computed_itemsize: int = 0
    ranks: int = 1
    uneven: bool = False
    embedding_bytes: int = 0
    output_bytes: int = 0
    splits_heads: bool = True
    brought_bytes: int = 0
    disk_bytes: int = 0
    stage: int = 0

    @property
    def goes_back(self) -> bool:
        """Whether a cache can be cropped to any length: no layer has a window or a state."""
        full = LayerKind.FULL
        return all(each.kind is full and each.streaming is None for each in self.layers)

    @functools.cached_property
    def full_layers(self) -> tuple[LayerShape, ...]:
        """What is offloaded of each layer: the heads that see all tokens.

        A planner asks for them thousands of times.
        """
        return tuple(track for track in self._tracks if track.kind is LayerKind.FULL)

    @functools.cached_property
    def kinds_of_full_layers(self) -> tuple[LayerShape, ...]:
        """One of each group of layers of `full_layers` that are equal."""
        return tuple(dict.fromkeys(self.full_layers))

    @functools.cached_property
    def kinds_of_layers(self) -> tuple[LayerShape, ...]:
        """One of each group of layers that are equal."""
        return tuple(dict.fromkeys(self.layers))

    @functools.cached_property
    def elements_of_full_layers(self) -> Mapping[int, int]:
        """How many of `full_layers` have so many elements a token."""
        return collections.Counter(layer.elements_per_token for layer in self.full_layers)

    @functools.cached_property
    def attention_layers(self) -> tuple[LayerShape, ...]:
        """The layers that keep keys and values, all tokens or a window of them."""
        return tuple(layer for layer in self.layers if layer.kind is not LayerKind.STATE)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the weights of one layer, taken as alike."""
        outside = self.embedding_bytes + self.output_bytes
        return max(self.weights_bytes - outside, 0) // max(len(self.layers), 1)

    @property
    def activation_itemsize(self) -> int:
        """Bytes of one element of the activations, and of the windows kept as computed."""
        return self.computed_itemsize or self.kv_itemsize

    @functools.cached_property
    def _full_elements(self) -> int:
        """Elements that one token adds to all offloaded layers; asked for at every step."""
        return sum(layer.elements_per_token for layer in self.full_layers)

    @functools.cached_property
    def _tracks(self) -> tuple[LayerShape, ...]:
        return tuple(track for layer in self.layers for track in layer.tracks)

    @functools.cached_property
    def windows(self) -> tuple[LayerShape, ...]:
        """What is kept on the device of each layer: the heads that see a window."""
        return tuple(track for track in self._tracks if track.kind is LayerKind.SLIDING)

    @property
    def kv_heads(self) -> int:
        """The largest number of KV heads of any offloaded layer; 0 when none is."""
        return max((layer.kv_heads for layer in self.kinds_of_full_layers), default=0)

    def kv_bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes of the offloaded layers' KV cache for `tokens` tokens in each of `batch` rows."""
        return batch * tokens * self._full_elements * self.kv_itemsize

    def host_kv_bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes of the same tokens in host memory, where they may be packed."""
        if not self.packs:
            return self.kv_bytes(tokens, batch)
        each = [layer.host_bytes(tokens, self.kv_itemsize) for layer in self.full_layers]
        return batch * sum(each)

    @functools.cached_property
    def packed_layers(self) -> tuple[LayerShape, ...]:
        """Those of `full_layers` whose tokens are packed in host memory."""
        dense = Format.DENSE
        return tuple(layer for layer in self.full_layers if layer.host_format is not dense)

    @functools.cached_property
    def packed_dims(self) -> tuple[int, ...]:
        """Elements of a key or value that is packed in host memory: each number once."""
        return tuple(
            sorted({dim for each in self.packed_layers for dim in (each.key_dim, each.value_dim)})
        )

    @property
    def packs(self) -> bool:
        """Whether tokens of any layer are packed in host memory."""
        return bool(self.packed_layers)

    @functools.cached_property
    def host_format(self) -> Format:
        """The form of tokens in host memory, of the layers that are not dense where any is."""
        forms = [layer.host_format for layer in self.full_layers]
        return next((form for form in forms if form is not Format.DENSE), Format.DENSE)

    @functools.cached_property
    def packed_share(self) -> float:
        """Bytes that tokens take in host memory, over those of them as they are computed."""
        many = Format.PACKED.row_tokens
        return self.host_kv_bytes(many) / (self.kv_bytes(many) or 1) if self.packs else 1.0

    @functools.cached_property
    def packed(self) -> "ModelShape":
        """The model with tokens packed in host memory, in each layer whose dims allow it.

        Its keys and values must be bfloat16.
        """
        return self.stored_as(Format.PACKED)

    @functools.cached_property
    def dense(self) -> "ModelShape":
        """The model with tokens in host memory as they are computed."""
        return self.stored_as(Format.DENSE) if self.packs else self

    def stored_as(self, wanted: Format) -> "ModelShape":
        """Return the model with tokens of a form in host memory, in each layer that can have it."""
        layers = tuple(
            replace(layer, host_format=wanted)
            if layer.kind is LayerKind.FULL and can_pack(layer.key_dim, layer.value_dim)
            else layer
            for layer in self.layers
        )
        return replace(self, layers=layers)

    def window_bytes(self, new_tokens: int, batch: int = 1) -> int:
        """Peak bytes of the sliding layers' windows while `new_tokens` tokens pass through.

        A layer holds its last `window - 1` tokens, its sinks and the tokens of the pass. One layer
        at a time holds both the old and the concatenated state.
        """
        sizes = [
            (layer.sink_tokens + layer.window_tokens - 1 + new_tokens) * layer.elements_per_token
            for layer in self.windows
        ]
        return batch * (sum(sizes) + max(sizes, default=0)) * self.activation_itemsize

    def seen_kv_bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes of KV that the queries behind `tokens` tokens see."""
        windows = sum(
            min(layer.sink_tokens + layer.window_tokens - 1, tokens) * layer.elements_per_token
            for layer in self.windows
        )
        return self.kv_bytes(tokens, batch) + batch * windows * self.kv_itemsize

    def standard_kv_bytes(self, tokens: int, batch: int = 1) -> int:
        """Bytes of KV that standard inference holds on the device for the same tokens."""
        return self.exact.seen_kv_bytes(tokens, batch)

    @functools.cached_property
    def exact(self) -> "ModelShape":
        """The model without heads that stream; itself where none does."""
        if all(layer.streaming is None for layer in self.layers):
            return self
        return replace(self, layers=tuple(replace(layer, streaming=None) for layer in self.layers))
