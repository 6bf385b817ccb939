"""Trials that ended, of rows that are not finished: what a run that goes on need not run again.

Pure Python, never torch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from headinfer.bench.gate import Verdict
from headinfer.bench.launch import Outcome
from headinfer.bench.result import TrialResult
from headinfer.bench.variant import Variant


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A trial that ended.

    Attributes:
        variant: what ran.
        context_tokens: tokens of its prompt.
        outcome: how it ended. Only that of a check has logits: those of nine steps take megabytes.
        verdict: its logits compared with the reference's; None where there was no reference.
    """

    variant: Variant
    context_tokens: int
    outcome: Outcome
    verdict: Verdict | None


class Unfinished:
    """A collection of trials whose rows are not finished, in the order they ended.

    Args:
        trials: of an earlier run.
        reference: what the checks before timing are compared with.

    Attributes:
        reference: what they are compared with, as long as some are missing; else None.
    """

    def __init__(self, trials: Iterable[Ended] = (), reference: Ended | None = None) -> None:
        self._trials = list(trials)
        self.reference = reference

    def __iter__(self) -> Iterator[Ended]:
        return iter(self._trials)

    def __len__(self) -> int:
        return len(self._trials)

    def add(
        self, variant: Variant, context_tokens: int, outcome: Outcome, verdict: Verdict | None
    ) -> Ended:
        """Keep a trial, and return what is kept."""
        if isinstance(outcome, TrialResult):
            outcome = replace(outcome, logits=())
        trial = Ended(
            variant=variant, context_tokens=context_tokens, outcome=outcome, verdict=verdict
        )
        self._trials.append(trial)
        return trial

    def of(self, variant: Variant, context_tokens: int) -> list[Ended]:
        """Return the trials of a variant at one context."""
        return [
            trial
            for trial in self._trials
            if (trial.variant, trial.context_tokens) == (variant, context_tokens)
        ]

    def drop(self, variant: Variant, context_tokens: int | None = None) -> None:
        """Forget the trials of a row that is finished; of None, those of a whole search."""
        self._trials = [
            trial
            for trial in self._trials
            if trial.variant != variant or context_tokens not in (None, trial.context_tokens)
        ]
