"""How long a prefill and a decode step take, from a model's shape, a machine and a placement.

Each step takes as long as its slowest part, because copies run beside attention (the paper's
section 3.3). The parts are computing, the link to the device with the host that starts its tiles,
the link back, and the host's own share. `docs/memory-model.md` states the formulas.
"""

import collections
import math
from dataclasses import replace

from headinfer.plan.hardware import Hardware
from headinfer.plan.price import Price
from headinfer.plan.shape import LayerKind, ModelShape
from headinfer.plan.step_time import Parts, Placement
from headinfer.schedule.route import Held, Pass, Sizes, route_track
from headinfer.schedule.track import Track

ANSWER_TOKENS = 256
"""Tokens of the answer by which plans are compared: a prefill and so many decode steps."""

_TILE_START_S = 100e-6
"""Seconds to start the attention of one tile from Python.

Measured beside an H100 with torch 2.11, Llama-3-8B at 10K tokens: 512 tiles and their copies made a
step 55 ms longer."""

_LAYER_START_S = 0.75e-3
"""Seconds to start a layer's own kernels from Python.

Measured with Llama-3-8B and nothing to stream: a step took 30 ms in the paper, and 23 to 26 beside
an H100."""

_MEASURED_TILE_TOKENS = 16 * 1024
"""Tokens of the tile that a GPU's attention of chunks was measured with. Kernels are chosen by
query rows times keys, so that a smaller tile counts as a smaller chunk."""

_ROUNDED_UP = 1.5
"""A prompt's chunks are taken as equally long, and so up to this factor shorter than planned."""

_CHUNK_LAYER_S = 1.6e-3
"""Seconds that a chunk takes in a layer beside its products and attention, where some stream.

Measured on an H100, Llama-3-8B and 100K tokens: 50 chunks took 51 ms each more than 13 did, and 25
chunks 65 ms."""

ASKED_LAYER_S = 0.25e-3
"""Seconds that a layer takes in a decode step, beside its bytes, where the CPU attends a share.

The device asks with the layer's query, and goes on once the answer is there.

Measured beside an H200, Llama-3-8B held to 24 GiB and 64K tokens, of which 4K are not resident:

- the link alone: 10 ms a step
- the CPU with 64% of those: 14 ms a step"""

_MERGED_BYTES = 7
"""Bytes of device memory moved for each element of a partial output that is merged into others.

Four at once move 14 bytes for three more, in bfloat16. Merged one by one they move 10 each. Then
they took as long as 14 bytes, as measured on an H100 with chunks of 8K tokens. Four at once are
taken to take longer than their bytes by as much, and were not measured."""

_PRICED_PAGE_TOKENS = 1
"""Each token of a decode step is priced as if it was sent home by itself: a page's way there is
spread over its tokens."""

_MANY_TOKENS = 1024
"""Tokens of whole pages, where they are packed, by which a token's bytes are known."""

_SAMPLED_CHUNKS = 16
"""Chunks of a prefill that are computed; more are represented by these."""


def _attention_flops_per_s(hardware: Hardware, chunk_tokens: float) -> float:
    """Return the rate of a chunk's attention: of the largest chunk measured that is not larger."""
    rates = hardware.chunk_attention_flops_per_s
    if not rates:
        return hardware.prefill_attention_flops_per_s
    fitting = [rate for tokens, rate in rates if tokens <= _ROUNDED_UP * chunk_tokens]
    return fitting[-1] if fitting else rates[0][1]


def active_parameters(shape: ModelShape) -> int:
    """Parameters that one token is multiplied with in all layers, the output projection left out.

    Counted from widths: queries, keys, values and output, and three matrices of a gated MLP. A
    layer without KV counts as four square matrices.
    """
    total = 0
    for layer in shape.layers:
        attention = layer.elements_per_token + shape.query_heads * (layer.key_dim + layer.value_dim)
        if layer.kind is LayerKind.STATE:
            attention = 4 * shape.hidden_size
        total += shape.hidden_size * (attention + 3 * shape.mlp_width)
    return total


def sampled_chunks(
    chunk_tokens: int | None, context_tokens: int
) -> tuple[float, list[float], float]:
    """Return the chunks of a prefill that are computed, evenly spaced, where there are many.

    Chunks are taken as equally long.

    Args:
        chunk_tokens: tokens of a chunk at most; None for a prompt that passes as a whole.
        context_tokens: of the prompt.

    Returns:
        How many chunks each of them stands for, the tokens before each, and the tokens of one.
    """
    chunks = math.ceil(context_tokens / (chunk_tokens or context_tokens))
    new_tokens = context_tokens / chunks
    samples = min(chunks, _SAMPLED_CHUNKS)
    stride = chunks / samples
    past_tokens = [((sample + 0.5) * stride - 0.5) * new_tokens for sample in range(samples)]
    return stride, past_tokens, new_tokens


class Predictor:
    """A predictor of times of one model on one machine.

    Args:
        shape: the model.
        hardware: the machine; without a link tiles are attended where they lie.
    """

    def __init__(self, shape: ModelShape, hardware: Hardware) -> None:
        self._shape = shape
        self._hardware = hardware
        self._chunks_s: dict[tuple[float, float, float], float] = {}
        self._parameters = active_parameters(shape)
        self._kv_token_bytes = shape.kv_bytes(1)
        value_dims = [layer.value_dim for layer in shape.full_layers]
        self._out_elements = shape.query_heads * max(value_dims, default=0)
        # Layers with equal numbers of KV heads do the same: how many, and the bytes of a token on
        # the host.
        self._alike: dict[int, tuple[int, float]] = {}
        for layer in shape.full_layers:
            layers, token_bytes = self._alike.get(layer.kv_heads, (0, 0.0))
            token_bytes += layer.host_bytes(_MANY_TOKENS, shape.kv_itemsize) / _MANY_TOKENS
            self._alike[layer.kv_heads] = layers + 1, token_bytes
        # For each window there is, infinite in full layers: the summed dims of its layers. Where
        # some heads of a layer stream, each part counts by its share of the heads.
        self._dims: dict[float, float] = collections.defaultdict(float)
        for layer in shape.layers:
            for track in layer.tracks:
                window: float = math.inf
                if track.kind is LayerKind.SLIDING:
                    window = track.sink_tokens + track.window_tokens
                share = track.kv_heads / layer.kv_heads if layer.kv_heads else 1
                self._dims[window] += share * (layer.key_dim + layer.value_dim)

    def prefill_s(self, placement: Placement, context_tokens: int) -> float:
        """Return the seconds of a prefill: the sum over its chunks."""
        stride, past_tokens, new_tokens = sampled_chunks(placement.chunk_tokens, context_tokens)
        return stride * sum(
            self.chunk(placement, past, new_tokens).seconds(overlap=placement.overlap)
            for past in past_tokens
        )

    def decode_s(self, placement: Placement, context_tokens: int) -> float:
        """Return the seconds of one decode step behind `context_tokens` tokens."""
        return self.decode(placement, context_tokens).seconds(overlap=placement.overlap)

    def host_pays(self, placement: Placement, context_tokens: int) -> bool:
        """Whether a decode step is sooner with the host's share than with the link alone."""
        alone = replace(placement, host_share=0.0)
        return self.decode_s(placement, context_tokens) < self.decode_s(alone, context_tokens)

    def answer_s(self, placement: Placement, context_tokens: int) -> float:
        """Return the seconds of a prefill and `ANSWER_TOKENS` decode steps."""
        steps_s = ANSWER_TOKENS * self.decode_s(placement, context_tokens)
        return self.prefill_s(placement, context_tokens) + steps_s

    def least_answer_s(self, placement: Placement, context_tokens: int) -> float:
        """Return a lower bound of `answer_s`, at little cost: a prefill computes at least."""
        stride, past_tokens, new_tokens = sampled_chunks(placement.chunk_tokens, context_tokens)
        computing_s = [self._computing_s(placement, past, new_tokens) for past in past_tokens]
        return stride * sum(computing_s) + ANSWER_TOKENS * self.decode_s(placement, context_tokens)

    def chunk(self, placement: Placement, past_tokens: float, new_tokens: float) -> Parts:
        """Return the parts of one prefill chunk behind `past_tokens` tokens."""
        compute_s = self._computing_s(placement, past_tokens, new_tokens)
        parts = self._parts(placement, compute_s, past_tokens, new_tokens)
        return replace(parts, brought_s=self._brought_s())

    def _computing_s(self, placement: Placement, past_tokens: float, new_tokens: float) -> float:
        """Return the seconds in which the device computes a prefill chunk."""
        rows, seen = placement.batch * new_tokens, past_tokens + new_tokens / 2
        rate = _attention_flops_per_s(
            self._hardware, self._measured_as(placement, seen, new_tokens)
        )
        key = rows, seen, rate
        if key not in self._chunks_s:  # the same for most sizes of tiles
            self._chunks_s[key] = self._chunk_s(*key)
        return self._chunks_s[key]

    def _measured_as(self, placement: Placement, seen: float, new_tokens: float) -> float:
        """Return the tokens of the chunk whose attention was measured with as many pairs a tile."""
        if placement.tile_tokens is None or not self.streamed_bytes(placement, seen):
            return new_tokens
        return new_tokens * min(placement.tile_tokens / _MEASURED_TILE_TOKENS, 1.0)

    def _chunk_s(self, rows: float, seen: float, attention_flops_per_s: float) -> float:
        """Return the seconds the device computes a chunk of `rows` tokens that see `seen`."""
        hardware = self._hardware
        score_dims = sum(min(seen, window) * dims for window, dims in self._dims.items())
        attention_flops = 2.0 * self._shape.query_heads * rows * score_dims
        return (
            2.0 * self._parameters * rows / hardware.matmul_flops_per_s
            + self.weight_bytes_read(rows) / hardware.device_bytes_per_s
            + attention_flops / attention_flops_per_s
        )

    def decode(self, placement: Placement, context_tokens: int) -> Parts:
        """Return the parts of one decode step behind `context_tokens` tokens."""
        hardware, batch, placement = self._hardware, placement.batch, placement.in_answer
        on_host = self._host_share(placement, context_tokens) * self.streamed_bytes(
            placement, context_tokens
        )
        kv_bytes = placement.kv_share * self._shape.seen_kv_bytes(context_tokens, batch)
        kv_bytes -= on_host
        compute_s = (
            self.weight_bytes_read(batch) / hardware.device_bytes_per_s
            + kv_bytes / hardware.decode_attention_bytes_per_s
        )
        parts = self._parts(placement, compute_s, context_tokens, 1)
        return replace(parts, brought_s=self._brought_s())

    def _brought_s(self) -> float:
        """Return the seconds in which weights that lie elsewhere come to the device."""
        return self._hardware.brought_s(self._shape.brought_bytes, self._shape.disk_bytes)

    def weight_bytes_read(self, rows: float) -> float:
        """Return the bytes of weights read while `rows` tokens pass; idle experts are not read."""
        shape = self._shape
        one = (self._parameters + shape.vocab_size * shape.hidden_size) * shape.kv_itemsize
        return min(shape.weights_bytes, rows * one)

    def streamed_bytes(self, placement: Placement, past_tokens: float) -> float:
        """Return the bytes of that many tokens that cross the link each time they are attended."""
        if placement.tile_tokens is None:
            return 0.0
        past_bytes = placement.batch * past_tokens * self._kv_token_bytes
        return max(past_bytes - placement.resident_bytes, 0.0)

    def _host_share(self, placement: Placement, past_tokens: int) -> float:
        """Return the host's share of what is not resident; it cannot attend what is on a disk."""
        below = placement.disk_tokens(past_tokens)
        if not below:
            return placement.host_share
        beside = past_tokens - min(self._resident_tokens(placement), past_tokens)
        return min(placement.host_share, (past_tokens - below) / beside) if beside else 0.0

    def _resident_tokens(self, placement: Placement) -> int:
        return int(placement.resident_bytes / (placement.batch * self._kv_token_bytes or 1))

    def _disk_s(self, placement: Placement, past_tokens: int, new_tokens: int) -> float:
        """Return the seconds in which tokens are read from a disk, and new ones written to it."""
        below = placement.disk_tokens(past_tokens)
        read = max(below - self._resident_tokens(placement), 0)
        # A block goes at once: each token is taken to write its own part of it.
        spill = placement.disk_host_blocks * placement.disk_block_tokens
        written = min(max(past_tokens + new_tokens - spill, 0), new_tokens) if spill else 0
        token_bytes = placement.batch * sum(size for _, size in self._alike.values())
        return token_bytes * (
            read / self._hardware.disk_read_bytes_per_s
            + written / self._hardware.disk_write_bytes_per_s
        )

    def _host_s(self, streamed: float, asked: float, new_tokens: int) -> float:
        """Return the seconds in which the host attends its bytes, while the link reads the rest."""
        reached = self._hardware.host_attention_at(new_tokens, self._shape.host_format)
        attended_s = asked / reached
        return max(attended_s, streamed / self._hardware.host_and_link_bytes_per_s)

    def _parts(
        self, placement: Placement, compute_s: float, past_tokens: float, new_tokens: float
    ) -> Parts:
        """Add what the steps beside attention take to what the device computes."""
        link, batch = self._hardware.link_bytes_per_s, placement.batch
        resident_tokens = self._resident_tokens(placement)
        past, new = round(past_tokens), max(round(new_tokens), 1)
        if new > 1 and placement.tile_tokens is not None and link is not None:
            compute_s += len(self._shape.layers) * _CHUNK_LAYER_S
        if (
            placement.tile_tokens is None
            or link is None
            or not self._alike  # it has windows alone
            or past + new <= resident_tokens
        ):
            return Parts(compute_s=compute_s)
        price = Price(batch)
        sizes = Sizes(placement.tile_heads, placement.tile_tokens, _PRICED_PAGE_TOKENS)
        share = placement.host_share
        resident = min(past, resident_tokens)
        partials = 0.0  # of all heads, to be merged into others
        asking = 0  # layers
        for kv_heads, (layers, token_bytes) in self._alike.items():
            track, below = Track(kv_heads), placement.disk_tokens(past)
            held = Held(track, past, past, resident, resident_tokens, disk_tokens=below)
            before, asked_before = price.attended, price.asked_bytes
            for step in route_track(held, Pass.FORWARD, new, sizes, share).steps:
                price.add(step, batch * token_bytes, layers, kv_heads)
            asking += layers if price.asked_bytes > asked_before else 0
            groups = -(-kv_heads // placement.tile_heads)
            partials += (price.attended - before) / groups - layers
        hardware = self._hardware
        streamed = price.fetched_bytes + price.asked_bytes
        merged = max(partials, 0.0) * batch * new * self._out_elements
        return Parts(
            compute_s=compute_s + merged * _MERGED_BYTES / hardware.device_bytes_per_s,
            link_s=price.fetched_bytes / link,
            link_back_s=price.sent_bytes / (hardware.link_back_bytes_per_s or link),
            start_s=len(self._shape.layers) * _LAYER_START_S
            + price.attended * _TILE_START_S
            + price.copies * hardware.copy_start_s,
            host_s=self._host_s(streamed, price.asked_bytes, new) if price.asked_bytes else 0.0,
            asked_s=asking * ASKED_LAYER_S,
            disk_s=self._disk_s(placement, past, new),
        )
