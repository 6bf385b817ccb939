"""Captured decode steps of several ranks: each goes the way that all of them go.

How often a model runs differs with the way: a comparison runs it twice. Ranks that share a model
run it alike, or wait for each other for ever.
"""

from headinfer.engine.parted import CacheEngine
from headinfer.engine.ready import Form, ReadyStep
from headinfer.integration.decode_call import DecodeCall
from headinfer.ranks.group import Ranks


def go_alike(
    ranks: Ranks,
    call: DecodeCall | None,
    ready: ReadyStep,
    engine: CacheEngine,
    *,
    in_a_row: bool,
    known: bool,
) -> bool:
    """Whether all ranks go the same way with a call.

    Args:
        ranks: all of them.
        call: in the form that this rank captures; None for none.
        ready: what is ready for it.
        engine: the cache's.
        in_a_row: whether its call before was a step, too.
        known: whether captures of such calls served more tokens than one.
    """
    if ranks.size == 1:
        return True
    if call is None:
        return ranks.same(0)
    captured = engine.captured.get(call.key)
    if captured is not None and captured.reads != ready.reads:
        captured = None
    in_pieces = call.form is Form.IN_PIECES
    flags = (
        captured is not None,
        captured is not None and bool(captured.serves(call.past_tokens)),
        in_a_row,
        known,
        in_pieces,
        in_pieces and engine.sends_home,
    )
    return ranks.same(1 + sum(2**at * flag for at, flag in enumerate(flags)))
