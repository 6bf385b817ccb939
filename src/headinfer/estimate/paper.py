"""The paper's tables 3 to 8, 10, 11 and 14, each figure beside what formulas give for it.

Table 10's formulas count bytes (`headinfer.estimate.accounting`). Where they end is where a context
no longer fits, which tables 3, 4, 5 and 8 measured; `headinfer.plan.predict` predicts tables 6 and
7.
"""

from headinfer.estimate.comparison import Comparison, Row
from headinfer.estimate.methods import CHUNKED, LAYER_WISE, QUANTISED, STANDARD
from headinfer.estimate.paper_card import GIB, MODEL, ONE_HEAD, K, plans_at
from headinfer.estimate.paper_lengths import context_tables
from headinfer.estimate.paper_times import latency_tables, sparse_table


def comparisons() -> list[Comparison]:
    """Return all tables, computed now."""
    return [memory_table(), *context_tables(), *latency_tables(), sparse_table()]


_MEMORY_ROWS: tuple[tuple[str, int, tuple[float, ...]], ...] = (
    (STANDARD, 1024, (15.08, 128, 64, 207, 128)),
    (CHUNKED, 1024, (15.08, 128, 0.625, 143, 128)),
    (QUANTISED, 1024, (15.08, 32, 64, 111, 32)),
    (LAYER_WISE, 1024, (15.08, 8, 64, 87, 128)),
    (ONE_HEAD, 1024, (15.08, 1, 0.625, 16.7, 128)),
    (STANDARD, 25, (15.08, 3.13, 1.56, 19.77, 3.13)),
    (CHUNKED, 30, (15.08, 3.75, 0.63, 19.46, 3.75)),
    (QUANTISED, 45, (15.08, 1.41, 2.81, 19.30, 1.41)),
    (LAYER_WISE, 45, (15.08, 0.35, 2.81, 18.25, 5.63)),
    (ONE_HEAD, 4000, (15.08, 3.91, 0.63, 19.61, 500)),
)


def memory_table() -> Comparison:
    """Return Tables 10 and 11: Llama-3-8B at 1M tokens, and at the longest each method ran."""
    rows = []
    for method, k_tokens, paper in _MEMORY_ROWS:
        plan = plans_at(MODEL, k_tokens * K)[method]
        ours = (
            plan.weights_bytes,
            plan.kv_device_bytes,
            plan.activation_bytes,
            plan.total_device_bytes,
            plan.kv_total_bytes,
        )
        label = f"{method}, {'1M' if k_tokens == K else f'{k_tokens}K'}"
        rows.append(Row(label=label, paper=paper, ours=tuple(size / GIB for size in ours)))
    return Comparison(
        title="Tables 10 and 11: memory of Llama-3-8B",
        unit="GiB",
        columns=("weights", "KV on device", "activations", "total", "KV in all"),
        rows=tuple(rows),
        notes=(
            "Weights: 8,030,261,248 parameters of 2 bytes are 14.96 GiB. No count of parameters "
            "gives 15.08. The 0.125 GiB between are the KV of 1K tokens, or one 8192 x 8192 mask "
            "in 2 bytes: it was measured with something else on the card.",
            "Layer-wise holds two layers, head-wise two heads; 64 KiB of activations a token of "
            "the chunk.",
        ),
    )
