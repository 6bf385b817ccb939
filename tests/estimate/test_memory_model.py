"""The figures in docs/memory-model.md are those the planner computes."""

from pathlib import Path

from headinfer.estimate.machines import HARDWARE
from headinfer.estimate.methods import method_plans
from headinfer.estimate.presets import preset_shape
from headinfer.estimate.situation import Situation
from headinfer.units import format_bytes, format_seconds, format_tokens, parse_tokens

DOCUMENT = Path(__file__).parents[2] / "docs" / "memory-model.md"
MARK = "<!-- choice: {} -->\n"


def choices_by_context() -> str:
    """Return the plan chosen at each context, as a table."""
    lines = [
        "| context | chunk | tile | resident | in answers | streamed | prefill | decode, a token |",
        "|---|---|---|---|---|---|---|---|",
    ]
    hardware = HARDWARE["rtx-4090"]
    for context in ("10K", "64K", "128K", "256K", "1M", "4M"):
        situation = Situation(
            shape=preset_shape("llama-3-8b"),
            hardware=hardware,
            context_tokens=parse_tokens(context),
            device_memory_bytes=hardware.device_memory_bytes,
            host_memory_bytes=hardware.host_memory_bytes,
        )
        plan = method_plans(situation)[-1]
        tile = f"{plan.tile_heads} x {format_tokens(plan.tile_tokens or 0)}"
        cells = (
            context,
            format_tokens(plan.chunk_tokens or 0),
            tile if plan.streamed_bytes else "-",
            format_bytes(plan.resident_bytes),
            format_bytes(plan.answer_resident_bytes),
            format_bytes(plan.streamed_bytes) if plan.streamed_bytes else "-",
            format_seconds(plan.prefill_s),
            format_seconds(plan.decode_s_per_token),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_choices_are_as_printed() -> None:
    _, rest = DOCUMENT.read_text().split(MARK.format("begin"))
    assert rest.split(MARK.format("end"))[0] == choices_by_context()
