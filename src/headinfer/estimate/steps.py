"""What a planned method does in one pass, step by step."""

from headinfer.estimate.situation import MethodPlan, Situation
from headinfer.plan.resolve import PAGE_TOKENS
from headinfer.plan.shape import LayerKind
from headinfer.plan.step_time import tokens_below
from headinfer.schedule.route import Held, Pass, Sizes, route
from headinfer.schedule.steps import Schedule
from headinfer.schedule.track import Track


def pass_schedule(
    situation: Situation, plan: MethodPlan, past_tokens: int, new_tokens: int
) -> Schedule:
    """Return what a forward pass does, layer by layer, where our engine runs a method.

    Args:
        situation: the model, and the number of rows.
        plan: of the method; without tiles all its tokens are resident.
        past_tokens: that came before; the host holds all of them, the device the resident ones.
        new_tokens: of the pass; at most a chunk. One is a decode step's.
    """
    shape = situation.shape
    token_bytes = shape.kv_bytes(1, situation.batch)
    resident_tokens = _resident_bytes(plan, new_tokens) // token_bytes if token_bytes else 0
    if plan.tile_heads is None:
        resident_tokens = past_tokens + new_tokens
    below = tokens_below(past_tokens, plan.disk_block_tokens, plan.disk_host_blocks)
    tile_tokens = plan.tile_tokens or max(past_tokens, 1)
    tracks = []
    for layer in shape.attention_layers:
        track = Track(layer.kv_heads, layer.window_tokens or None)
        if layer.kind is LayerKind.SLIDING:
            tracks.append(Held(track, past_tokens))
            continue
        resident = min(past_tokens, resident_tokens)
        held = Held(track, past_tokens, past_tokens, resident, resident_tokens)
        tracks.append(held._replace(disk_tokens=below))
    sizes = Sizes(
        tile_heads=plan.tile_heads or shape.kv_heads,
        tile_tokens=min(tile_tokens, plan.disk_block_tokens or tile_tokens),
        page_tokens=PAGE_TOKENS,
        in_place=situation.device == "cpu",
    )
    return route(tracks, Pass.FORWARD, new_tokens, sizes, plan.host_share)


def _resident_bytes(plan: MethodPlan, new_tokens: int) -> int:
    return plan.answer_resident_bytes if new_tokens == 1 else plan.resident_bytes


def disk_line(
    situation: Situation, plan: MethodPlan, past_tokens: int, new_tokens: int
) -> str | None:
    """Say which tokens a pass reads from the disk; None where it reads none."""
    below = tokens_below(past_tokens, plan.disk_block_tokens, plan.disk_host_blocks)
    token_bytes = situation.shape.kv_bytes(1, situation.batch)
    first = _resident_bytes(plan, new_tokens) // token_bytes if token_bytes else 0
    if below <= first:
        return None
    return f"  tokens {first} to {below} are read from the disk ahead of the link"
