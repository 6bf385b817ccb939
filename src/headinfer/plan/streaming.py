"""Which KV heads of a model stream, by a pattern and a share."""

import random
from collections.abc import Sequence
from dataclasses import replace

from headinfer.errors import OptionError
from headinfer.heads.formats import read_pattern
from headinfer.heads.pattern import HeadPattern
from headinfer.plan.options import Options
from headinfer.plan.shape import LayerKind, ModelShape, StreamingHeads
from headinfer.units import counted

SINK_TOKENS = 128
RECENT_TOKENS = 256
"""What streaming heads see where nothing says otherwise: what DuoAttention trains patterns with."""

STREAMING_OPTIONS = ("sparsity", "head_pattern", "sink_tokens", "recent_tokens")
"""Names of the options that say which heads stream, and what these see."""

PAPERS_SPARSITY = 0.5
"""Share of the KV heads that stream in the paper's Table 14."""

RANDOM = "random"
"""Name of a pattern of no meaning, to measure with; it may be followed by a colon and a seed."""


def random_pattern(name: str, kv_heads: Sequence[int]) -> HeadPattern | None:
    """Return the pattern of random scores that a name stands for; None for other names.

    Args:
        name: `RANDOM`, or that with a seed, such as "random:7".
        kv_heads: KV heads of each decoder layer.

    Raises:
        OptionError: the seed is no number.
    """
    kind, colon, seed = name.partition(":")
    if kind != RANDOM:
        return None
    if colon and not seed.isdecimal():
        raise OptionError(f"head_pattern 'random' takes a number as its seed, not {seed!r}")
    drawn = random.Random(int(seed or 0))
    scores = tuple(tuple(drawn.random() for _ in range(heads)) for heads in kv_heads)
    return HeadPattern(scores=scores, made=f"at random, seed {int(seed or 0)}")


def pattern_of(name: str, shape: ModelShape) -> HeadPattern:
    """Return the pattern that users mean by a name or a path, which fits a model.

    Args:
        name: see `random_pattern`; else the path of a file or folder.
        shape: the model.

    Raises:
        OptionError: it cannot be read, or is of another shape than the model.
    """
    kv_heads = kv_heads_of(shape)
    return random_pattern(name, kv_heads) or read_pattern(name, kv_heads)


def kv_heads_of(shape: ModelShape) -> tuple[int, ...]:
    """Return the KV heads of each decoder layer, 0 where a layer has none."""
    return tuple(layer.kv_heads for layer in shape.layers)


def check_streaming(options: Options) -> None:
    """Refuse options of streaming heads that mean nothing together.

    Raises:
        OptionError: they do.
    """
    if options.sparsity and options.head_pattern is None:
        raise OptionError(
            f"sparsity is {options.sparsity:g}, but no head_pattern says which heads stream; "
            "`headinfer heads` finds one"
        )
    given = [
        name
        for name, is_given in (
            ("head_pattern", options.head_pattern is not None),
            ("sink_tokens", options.sink_tokens != "auto"),
            ("recent_tokens", options.recent_tokens != "auto"),
        )
        if is_given
    ]
    if given and not options.sparsity:
        raise OptionError(
            f"{given[0]} is given, but sparsity is 0, so that no head streams; give the share of "
            "KV heads that do, such as 0.5"
        )


def evenly_streaming(shape: ModelShape, options: Options) -> ModelShape:
    """Return a model's shape in which about as many heads of each layer stream, to plan with."""
    equal = HeadPattern(scores=tuple((0.0,) * layer.kv_heads for layer in shape.layers))
    return with_streaming_heads(shape, equal, options)


def with_streaming_heads(shape: ModelShape, pattern: HeadPattern, options: Options) -> ModelShape:
    """Return a model's shape in which the heads of the lowest scores stream.

    Args:
        shape: the model. Heads of layers that see all tokens may stream, and no others.
        pattern: the scores.
        options: the share of these heads, and what they see.

    Raises:
        OptionError: the pattern is of another shape than the model.
    """
    pattern.check(kv_heads_of(shape))
    full = [at for at, layer in enumerate(shape.layers) if layer.kind is LayerKind.FULL]
    chosen = pattern.streaming_heads(options.sparsity, full)
    sinks, recent = options.sink_tokens, options.recent_tokens
    if sinks == "auto":
        sinks = SINK_TOKENS if pattern.sink_tokens is None else pattern.sink_tokens
    if recent == "auto":
        recent = RECENT_TOKENS if pattern.recent_tokens is None else pattern.recent_tokens
    layers = [
        replace(
            layer, streaming=StreamingHeads(heads=heads, sink_tokens=sinks, recent_tokens=recent)
        )
        if heads
        else layer
        for layer, heads in zip(shape.layers, chosen, strict=True)
    ]
    return replace(shape, layers=tuple(layers))


def with_pattern(shape: ModelShape, options: Options) -> ModelShape:
    """Return a model's shape with the heads that stream by the user's pattern, if any do.

    Raises:
        OptionError: the options mean nothing together, or no head would stream.
    """
    check_streaming(options)
    if options.head_pattern is None:
        return shape
    pattern = pattern_of(options.head_pattern, shape)
    streaming = with_streaming_heads(shape, pattern, options)
    if streaming.exact is streaming:
        heads = sum(layer.kv_heads for layer in shape.full_layers)
        raise OptionError(
            f"sparsity {options.sparsity:g} of the {counted(heads, 'KV head')} with all tokens in "
            "view is none of them; give a larger share, or 0 for none"
        )
    return streaming
