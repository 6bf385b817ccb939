"""HeadInfer with a model that drafts for itself, as many tokens accepted as a record says."""

import itertools
import statistics
import time

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from headinfer.bench.ours import HeadInfer
from headinfer.bench.replay import Replay
from headinfer.bench.spec import TrialSpec
from headinfer.errors import OptionError
from headinfer.integration.cache import OffloadedCache
from headinfer.integration.calls import cache_argument, last_logits

_SETTLING_PASSES = 48
"""Verifying passes at the most before times are taken: what CPU and device share may not settle."""


class Drafted(HeadInfer):
    """A method that drafts some tokens, verifies them in one pass, and takes those accepted.

    What is drafted is thrown away: the tokens that are accepted are those that every method is
    given. So the logits can be compared, and the times are those of the work that there would be.

    Args:
        model: the model.
        spec: the trial, with a record to replay.
    """

    def __init__(self, model: PreTrainedModel, spec: TrialSpec) -> None:
        if spec.replay is None:
            raise OptionError(
                "drafts of random weights tell nothing: give --replay and a file that "
                "benchmarks/drafts.py wrote"
            )
        self._replay: Replay = spec.replay
        self._accepted = itertools.cycle(self._replay.accepted)
        self._drafts_s: list[float] = []
        self._passes_s: list[float] = []
        super().__init__(model, spec, draft_tokens="auto")
        self.note = "; ".join(filter(None, (self.note, self._replay.note)))

    def next_tokens(self, left: int, cache: Cache) -> int:
        """Return how many tokens the next step takes, of those that are left."""
        assert isinstance(cache, OffloadedCache)
        if cache.can_draft is not None:
            return 1
        return min(next(self._accepted) + 1, left)

    def step(self, token: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Draft, and pass tokens `[1, tokens]` among drafts; return their logits.

        Args:
            token: as many as `next_tokens` said.
            cache: which changes by these tokens.

        Returns:
            Logits `[tokens, vocab]`; those of one token, `[vocab]`, where nothing can be drafted.
        """
        assert isinstance(cache, OffloadedCache)
        if cache.can_draft is not None:
            return super().step(token, cache)
        began_s = time.perf_counter()
        drafted = self._drafted(token[:, :1], cache)
        drafted_s = time.perf_counter()
        taken = token.shape[1]
        logits = self._verified(torch.cat((token, drafted[:, taken - 1 :]), dim=1), taken, cache)
        self._drafts_s.append(drafted_s - began_s)
        self._passes_s.append(time.perf_counter() - drafted_s)
        return logits

    def _verified(self, tokens: torch.Tensor, taken: int, cache: OffloadedCache) -> torch.Tensor:
        """Pass as many of some tokens `[1, tokens]` as are drafted, and the one before them.

        Returns:
            Logits `[taken, vocab]` of those that the cache keeps: the first ones.
        """
        passed = self._verified_tokens
        with cache.verifying():
            output = self._model(
                input_ids=tokens[:, :passed],
                use_cache=True,
                logits_to_keep=passed,
                **cache_argument(self._model, cache),
            )
        if passed > taken:
            cache.crop(taken - passed)
        logits: torch.Tensor = output.logits[0, :taken]
        return logits

    @property
    def _verified_tokens(self) -> int:
        """Tokens of a verifying pass."""
        return self._replay.drafts + 1

    def _drafted(self, newest: torch.Tensor, cache: OffloadedCache) -> torch.Tensor:
        """Return drafts `[1, drafts]`."""
        drafted: list[torch.Tensor] = []
        with cache.drafting():
            for _ in range(self._replay.drafts):
                newest = last_logits(self._model, newest, cache).argmax()[None, None]
                drafted.append(newest)
        return torch.cat(drafted, dim=1)

    @property
    def draft_s(self) -> float | None:
        """Seconds of the drafts of one verification, the median; None before any."""
        return statistics.median(self._drafts_s) if self._drafts_s else None

    @property
    def verify_s(self) -> float | None:
        """Seconds of a verifying pass, the median; None before any."""
        return statistics.median(self._passes_s) if self._passes_s else None

    def sizes(self, cache: Cache) -> dict[str, int] | None:
        """Return the sizes of the plan, and the CPU's share of a verifying pass."""
        assert isinstance(cache, OffloadedCache)
        assert cache.state.engine is not None
        share = cache.state.engine.host_share_at(self._verified_tokens)
        return {**(super().sizes(cache) or {}), "verify_host_attended_percent": round(100 * share)}

    def make_ready(self, token: torch.Tensor, cache: Cache) -> None:
        """Begin the record anew, once the CPU's share of verifying passes has settled.

        A new answer begins with the share that those before it have settled on. Here the cache is
        the first one of its context. So passes come first that are taken back as a whole.

        Args:
            token: to pass, `[1, 1]`.
            cache: with a prompt; its tokens stay as they are.
        """
        assert isinstance(cache, OffloadedCache)
        super().make_ready(token, cache)
        engine, passed = cache.state.engine, self._verified_tokens
        for _ in range(_SETTLING_PASSES // 2):
            settled = engine is None or engine.has_settled_at(passed)
            if settled or cache.can_draft is not None:
                break
            # A capture serves once it was compared behind another number of tokens.
            for kept in (1, 0):
                self._verified(token.expand(1, passed), kept, cache)
            cache.crop(-1)
        self._accepted = itertools.cycle(self._replay.accepted)
        self._drafts_s, self._passes_s = [], []
