"""Captured decode steps of several ranks: each goes the way that all of them go.

How often a model runs differs with the way: a comparison runs it twice. Ranks that share a model
run it alike, or wait for each other for ever.
"""

from collections.abc import Hashable, Sequence, Set
from typing import NamedTuple

from headinfer.engine.parted import CacheEngine
from headinfer.engine.ready import Form, ReadyStep
from headinfer.integration.decode_call import DecodeCall
from headinfer.ranks.group import Ranks


class Way(NamedTuple):
    """A way in which a call can be captured or replayed.

    Attributes:
        call: in one form.
        ready: what is ready for it.
    """

    call: DecodeCall
    ready: ReadyStep

    @property
    def in_pieces(self) -> bool:
        """Whether it is captured in pieces, and not in one launch."""
        return self.call.form is Form.IN_PIECES


def go_alike(
    ranks: Ranks,
    ways: Sequence[Way],
    engine: CacheEngine,
    *,
    in_a_row: bool,
    known: Set[Hashable],
) -> Way | None:
    """Return the best way that all ranks can go with a call; None where they have none.

    A rank may have one launch ready before another has: when the share of its CPU is settled, each
    finds out by itself. All of them go in pieces until then.

    Args:
        ranks: all of them.
        ways: of this rank, the best first: one in a single launch, and one in pieces.
        engine: the cache's. It loses the captures that other ranks lack.
        in_a_row: whether its call before was a step of as many tokens, too.
        known: calls whose captures served more tokens than one.
    """
    if ranks.size == 1:
        return ways[0] if ways else None
    whole = next((way for way in ways if not way.in_pieces), None)
    pieces = next((way for way in ways if way.in_pieces), None)
    numbers = [
        0 if way is None else _number(way, engine, in_a_row=in_a_row, known=known)
        for way in (whole, pieces)
    ]
    low = ranks.least(*numbers, *(-number for number in numbers))
    for way, least, most in zip((whole, pieces), low[:2], low[2:], strict=True):
        if least == -most and least > 0:
            return way
        if least > 0 or way is pieces:
            _forget(way, engine)  # or what one rank alone still has would keep them apart for good
    _forget(whole, engine)
    return None


def _number(way: Way, engine: CacheEngine, *, in_a_row: bool, known: Set[Hashable]) -> int:
    """Return a number above 0 that tells what would be done."""
    call = way.call
    captured = engine.captured.get(call.key)
    if captured is not None and captured.reads != way.ready.reads:
        captured = None
    flags = (
        captured is not None,
        captured is not None and bool(captured.serves(call.past_tokens)),
        in_a_row,
        call.key in known,
        way.in_pieces and engine.sends_home,
    )
    return 1 + sum(1 << at for at, flag in enumerate(flags) if flag)


def _forget(way: Way | None, engine: CacheEngine) -> None:
    if way is not None:
        engine.captured.pop(way.call.key, None)
