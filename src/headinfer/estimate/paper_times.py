"""The paper's tables 6, 7 and 14: times that it measured, each beside what is predicted."""

from collections.abc import Callable

from headinfer.estimate.comparison import Comparison, Row
from headinfer.estimate.methods import ADAPTIVE, HEAD_WISE, HEAD_WISE_SPARSE, LAYER_WISE, STANDARD
from headinfer.estimate.paper_card import MODEL, ONE_HEAD, K, plans_at
from headinfer.estimate.situation import MethodPlan

_LENGTHS = (1, 10, 20, 40, 100, 200, 400, 1024, 2048, 4096)
_NONE = (None,) * 10
_PREFILL: dict[str, tuple[float | None, ...]] = {
    STANDARD: (0.11, 1.23, 2.83, *_NONE[:7]),
    LAYER_WISE: (0.12, 1.24, 2.84, 6.93, *_NONE[:6]),
    f"{HEAD_WISE}-8": (0.12, 1.24, 2.84, 7.11, 30.2, 100, 357, *_NONE[:3]),
    f"{HEAD_WISE}-4": (0.13, 1.23, 2.89, 7.26, 30.2, 99, 351, 2033, *_NONE[:2]),
    f"{HEAD_WISE}-2": (0.14, 1.23, 2.94, 7.54, 30.5, 100, 353, 2035, 7952, None),
    ONE_HEAD: (0.21, 1.27, 3.06, 7.77, 31.2, 101, 356, 2054, 7975, 27114),
    ADAPTIVE: (0.13, 1.24, 2.84, 7.11, 30.2, 99, 351, 2033, 7952, 27114),
}
_DECODE: dict[str, tuple[float | None, ...]] = {
    STANDARD: (0.03, 0.03, 0.03, 0.04, *_NONE[:6]),
    LAYER_WISE: (0.03, 0.09, 0.17, 0.28, 0.66, 1.3, 2.58, *_NONE[:3]),
    f"{HEAD_WISE}-8": (0.03, 0.09, 0.17, 0.28, 0.66, 1.3, 2.58, *_NONE[:3]),
    f"{HEAD_WISE}-4": (0.04, 0.10, 0.16, 0.28, 0.67, 1.31, 2.58, 6.41, *_NONE[:2]),
    f"{HEAD_WISE}-2": (0.06, 0.11, 0.17, 0.30, 0.68, 1.32, 2.59, 6.46, 13.7, None),
    ONE_HEAD: (0.10, 0.14, 0.21, 0.33, 0.71, 1.33, 2.61, 6.51, 13.8, 27.2),
    ADAPTIVE: (0.03, 0.09, 0.17, 0.28, 0.66, 1.73, 3.03, 6.41, 13.7, 27.2),
}


def latency_tables() -> list[Comparison]:
    """Return Tables 6 and 7: measured on the paper's card, and predicted for it."""
    plans = [plans_at(MODEL, k_tokens * K) for k_tokens in _LENGTHS]
    return [
        Comparison(
            title="Table 6: prefill of Llama-3-8B on the RTX 4090",
            unit="s",
            columns=tuple(_PREFILL),
            rows=_latency_rows(_PREFILL, plans, lambda plan: plan.prefill_s),
            notes=(
                "Predicted from 165 TFLOP/s for products and 80% of it for attention. The paper's "
                "products ran at 130 to 140 (1K, 10K), its attention at 82% (200K) to 90% (1M).",
                "From 2M to 4M exact attention does four times the work; the paper's time grows by "
                "3.4, ours by 4.",
            ),
        ),
        Comparison(
            title="Table 7: one decode step of Llama-3-8B on the RTX 4090",
            unit="s",
            columns=tuple(_DECODE),
            rows=_latency_rows(_DECODE, plans, lambda plan: plan.decode_s_per_token),
            notes=(
                "Predicted from a link of 25 GB/s, busy all the time but a tenth of starting; the "
                "paper moved 20 to 21.",
                "Short contexts are limited by starting kernels from Python, which standard "
                "inference shows: 30 ms where reading the weights takes 15. We do not count it.",
                "Its adaptive method is slower at 200K and 400K than any of the fixed ones it "
                "chooses among.",
            ),
        ),
    ]


def sparse_table() -> Comparison:
    """Return Table 14: half of the heads stream, by DuoAttention's pattern."""
    plans = [plans_at(MODEL, K * K, sparse=sparse)[ONE_HEAD] for sparse in (False, True)]
    return Comparison(
        title="Table 14: Llama-3-8B at 1M on the RTX 4090, half of the heads streaming",
        unit="s",
        columns=(ONE_HEAD, HEAD_WISE_SPARSE),
        rows=(
            Row(
                label="prefill",
                paper=(2054, 1152),
                ours=tuple(plan.prefill_s for plan in plans),
            ),
            Row(
                label="decode",
                paper=(6.51, 3.28),
                ours=tuple(plan.decode_s_per_token for plan in plans),
            ),
        ),
        notes=(
            "Tiles of one head and all tokens in both columns; DuoAttention's pattern there, as "
            "many streaming heads in each layer here.",
        ),
    )


def _latency_rows(
    paper: dict[str, tuple[float | None, ...]],
    plans: list[dict[str, MethodPlan]],
    time_of: Callable[[MethodPlan], float],
) -> tuple[Row, ...]:
    rows = []
    for place, k_tokens in enumerate(_LENGTHS):
        measured = tuple(times[place] for times in paper.values())
        predicted = tuple(
            None if seconds is None else time_of(plans[place][method])
            for method, seconds in zip(paper, measured, strict=True)
        )
        label = f"{k_tokens}K" if k_tokens < K else f"{k_tokens // K}M"
        rows.append(Row(label=label, paper=measured, ours=predicted))
    return tuple(rows)
