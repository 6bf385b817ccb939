"""A pattern of heads: how much each KV head of a model needs tokens that are far away.

A *streaming* head sees the first tokens of a context, the sinks, and its newest ones. A *full* head
sees all. A pattern has a score for every KV head; the heads of the lowest scores stream.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_DOWN, Decimal

from headinfer.errors import OptionError
from headinfer.units import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPattern:
    """A score for each KV head of a model.

    Attributes:
        scores: by decoder layer and KV head. A higher score needs all tokens more.
        sink_tokens: first tokens that streaming heads should see; None where nothing is said.
        recent_tokens: newest tokens that streaming heads should see, the query's own included; None
            where nothing is said.
        model: name of the model that the scores are of, or empty.
        made: how the scores were made, or empty.

    Raises:
        OptionError: there are no scores, one is no number, or a count of tokens is out of range.
    """

    scores: tuple[tuple[float, ...], ...]
    sink_tokens: int | None = None
    recent_tokens: int | None = None
    model: str = ""
    made: str = ""

    def __post_init__(self) -> None:
        if not any(self.scores):
            raise OptionError("a head pattern must have a score for each KV head, but has none")
        for layer, row in enumerate(self.scores):
            for head, score in enumerate(row):
                if not math.isfinite(score):
                    raise OptionError(
                        f"a head's score must be a number, but that of KV head {head} in layer "
                        f"{layer} is {score}"
                    )
        for name, tokens, least in (
            ("sink_tokens", self.sink_tokens, 0),
            ("recent_tokens", self.recent_tokens, 1),
        ):
            if tokens is not None and tokens < least:
                raise OptionError(
                    f"{name} of a head pattern must be at least {least}, not {tokens}"
                )

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """KV heads of each decoder layer."""
        return tuple(map(len, self.scores))

    def check(self, kv_heads: Sequence[int]) -> None:
        """Check that the pattern fits a model.

        Args:
            kv_heads: KV heads of each of the model's decoder layers, 0 where a layer has none.

        Raises:
            OptionError: it has other layers or heads than the model.
        """
        if self.kv_heads == tuple(kv_heads):
            return
        of = f" of {self.model!r}" if self.model else ""
        mine, its = shape_text(self.kv_heads), shape_text(kv_heads)
        if mine == its:
            layer, (here, there) = next(
                (layer, pair)
                for layer, pair in enumerate(zip(self.kv_heads, kv_heads, strict=True))
                if pair[0] != pair[1]
            )
            mine, its = f"{counted(here, 'KV head')} in layer {layer}", f"{there} there"
        raise OptionError(
            f"the head pattern{of} has {mine}, but the model has {its}; give one of this model"
        )

    def streaming_heads(
        self, sparsity: float, layers: Collection[int]
    ) -> tuple[tuple[int, ...], ...]:
        """Return the KV heads that stream, sorted, for each decoder layer.

        Their number is `sparsity` times that of all heads in the layers, rounded to the nearest
        integer, and half of one downwards. They have the lowest scores. Heads of equal scores
        stream in the order of their numbers, so that layers share them, and then of their layers.

        Args:
            sparsity: share of the heads that stream, from 0 to 1.
            layers: those that attend all tokens. No head of any other layer streams.

        Raises:
            OptionError: the share or a layer is out of range.
        """
        if not 0 <= sparsity <= 1:
            raise OptionError(f"sparsity must be from 0 to 1, not {sparsity!r}")
        for layer in layers:
            if not 0 <= layer < len(self.scores):
                raise OptionError(
                    f"the head pattern has {counted(len(self.scores), 'layer')}, and no {layer}"
                )
        ranked = sorted(
            (score, head, layer)
            for layer in set(layers)
            for head, score in enumerate(self.scores[layer])
        )
        # As decimals, for 0.15 of 10 heads are 1.5 and a float nearby would be rounded its own way.
        share = Decimal(str(float(sparsity))) * len(ranked)
        chosen: list[list[int]] = [[] for _ in self.scores]
        for _, head, layer in ranked[: int(share.to_integral_value(ROUND_HALF_DOWN))]:
            chosen[layer].append(head)
        return tuple(tuple(sorted(heads)) for heads in chosen)


def shape_text(kv_heads: Sequence[int]) -> str:
    """Return layers and heads for people: "32 layers x 8 KV heads"."""
    least, most = min(kv_heads, default=0), max(kv_heads, default=0)
    heads = counted(most, "KV head") if least == most else f"{least} to {most} KV heads"
    return f"{counted(len(kv_heads), 'layer')} x {heads}"
