"""The paper's machine and model, and every method of its Table 10 there."""

from headinfer.estimate.accounting import AccountingKind
from headinfer.estimate.machines import preset_hardware
from headinfer.estimate.methods import HEAD_WISE, papers_methods
from headinfer.estimate.presets import preset_shape
from headinfer.estimate.situation import MethodPlan, Situation

GIB, K = 2**30, 1024

HOST_BYTES = 512 * GIB
"""The paper keeps the KV cache in 512 GB of its 1 TB."""

CARD_BYTES = 24 * GIB

REACHED_BYTES = int(19.77 * GIB)
"""The largest total of Table 11: the most that the paper's runs came to on the 24 GiB card."""

MODEL = "llama-3-8b"
ONE_HEAD = f"{HEAD_WISE}-1"


def plans_at(
    model: str,
    tokens: int,
    *,
    device_bytes: int = CARD_BYTES,
    kind: AccountingKind = AccountingKind.PAPER,
    sparse: bool = False,
) -> dict[str, MethodPlan]:
    """Return the plans of all methods for a model and a context, on the paper's machine."""
    situation = Situation(
        shape=preset_shape(model),
        hardware=preset_hardware("rtx-4090"),
        context_tokens=tokens,
        device_memory_bytes=device_bytes,
        host_memory_bytes=HOST_BYTES,
        kind=kind,
    )
    situation = situation.sparse() if sparse else situation
    return {plan.method: plan for plan in papers_methods(situation)}
