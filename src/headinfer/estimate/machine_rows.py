"""What machines do for the same question, each by its best method: a row for each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from headinfer.estimate.choose import choose
from headinfer.estimate.choose_split import lacking
from headinfer.estimate.gpus import split_plans
from headinfer.estimate.methods import APPROXIMATE, RESIDENT, method_plans
from headinfer.estimate.situation import Situation
from headinfer.estimate.split_plan import Split, SplitPlan
from headinfer.plan.predict import ANSWER_TOKENS
from headinfer.units import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRow:
    """A row: a machine with some GPUs, and the fastest of what is exact on it.

    Attributes:
        situation: of one of the GPUs.
        gpus: how many.
        memory_bytes: the most to use of each.
        method: the best one; None where nothing fits.
        split: what each GPU has.
        brought_bytes: weights that cross a link each time that tokens pass.
        max_context_tokens: the longest context that it holds; None for no limit. Where nothing
            fits, it is the longest that anything exact holds.
        prefill_s: predicted seconds of the prefill; 0 where nothing fits.
        decode_s_per_token: predicted seconds of a decode step; 0 where nothing fits.
        lacking: what keeps it from fitting, in words; empty where it fits.
    """

    situation: Situation
    gpus: int
    memory_bytes: tuple[int, ...]
    method: str | None = None
    split: Split = Split.NONE
    brought_bytes: int = 0
    max_context_tokens: int | None = 0
    prefill_s: float = 0.0
    decode_s_per_token: float = 0.0
    lacking: str = ""

    @property
    def fits(self) -> bool:
        """Whether the context asked for does."""
        return self.method is not None

    @property
    def answer_s(self) -> float:
        """Predicted seconds of the prompt and a short answer together."""
        return self.prefill_s + ANSWER_TOKENS * self.decode_s_per_token


def machine_row(situation: Situation) -> MachineRow:
    """Return what one device does, whose weights all lie on it."""
    plans = method_plans(situation)
    choice, memory_bytes = choose(situation, plans), (situation.device_memory_bytes,)
    plan = choice.plan
    if plan is None:
        exact = [plan for plan in plans if plan.method not in APPROXIMATE]
        return MachineRow(
            situation=situation,
            gpus=1,
            memory_bytes=memory_bytes,
            max_context_tokens=_longest(plan.max_context_tokens for plan in exact),
            lacking=" ".join(choice.why),
        )
    return MachineRow(
        situation=situation,
        gpus=1,
        memory_bytes=memory_bytes,
        method=plan.method,
        max_context_tokens=plan.max_context_tokens,
        prefill_s=plan.prefill_s,
        decode_s_per_token=plan.decode_s_per_token,
    )


def gpus_row(
    situation: Situation, memory_bytes: Sequence[int], *, quantising: bool = False
) -> MachineRow:
    """Return what some GPUs do together, by the faster split; see `split_plans`."""
    gpus, layers = len(memory_bytes), len(situation.shape.layers)
    none = MachineRow(situation=situation, gpus=gpus, memory_bytes=tuple(memory_bytes))
    if gpus > layers:
        return replace(
            none, lacking=f"The model has {counted(layers, 'layer')}, and each GPU needs one."
        )
    plans = [
        plan
        for plan in split_plans(situation, memory_bytes, quantising=quantising)
        if plan.method == RESIDENT and (gpus == 1 or plan.split is not Split.NONE)
    ]
    rows = [_of_split(none, plan) for plan in plans if plan.fits]
    if rows:
        return min(rows, key=lambda row: row.answer_s)
    return replace(
        none,
        max_context_tokens=_longest(plan.max_context_tokens for plan in plans),
        lacking=f"{lacking(plans[0])}.",
    )


def _of_split(none: MachineRow, plan: SplitPlan) -> MachineRow:
    return replace(
        none,
        method=plan.method,
        split=plan.split,
        brought_bytes=plan.brought_bytes,
        max_context_tokens=plan.max_context_tokens,
        prefill_s=plan.prefill_s,
        decode_s_per_token=plan.decode_s_per_token,
    )


def _longest(lengths: Iterable[int | None]) -> int | None:
    known = list(lengths)
    return None if None in known else max(each for each in known if each is not None)
