"""How far the predictions of each method are from stock's, on the same tokens.

Stock reads the text beside every method, pass by pass, and so does a float32 reference in 16 bits.
So no logits are kept: memory holds those of one pass of each, whatever the length of the text.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from headinfer.bench.catalogue import CATALOGUE, REFERENCE_METHOD
from headinfer.bench.methods import METHODS
from headinfer.bench.result import Status
from headinfer.bench.trial import failure_of
from headinfer.evaluate.agreement.spec import AgreementSpec
from headinfer.evaluate.divergence import Tally
from headinfer.evaluate.pace import Pace, Progress
from headinfer.evaluate.reading import aligned, check_text, most_tokens, read, sharing_weights
from headinfer.units import counted, counted_tokens, format_tokens

EXACT_KL = 1e-6
"""Nats that an exact method may be from stock at any position in float32.

Tiny random models of 3 layers over 150 tokens:

- exact methods: at most 4e-13
- keys of the first token of each pass negated in one head of one layer: 2e-4 to 5e-2
"""

NO_FURTHER = 1.5
"""Times stock's mean divergence from float32 that an exact method in 16 bits may be away from it.

SmolLM2-135M over 1K to 8K tokens in bfloat16: 0.99 to 1.01 for the exact methods.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementRow:
    """A comparison of one method with stock over one text; without a result, why not.

    Attributes:
        method: its name.
        context_tokens: tokens of the text.
        exact: whether the method's predictions must be stock's.
        status: `MISMATCH` for an exact method that does not agree; see `EXACT_KL` and `NO_FURTHER`.
        reason: why there is no result.
        note: what a reader must know; empty for nothing.
        positions: how many were compared.
        differing: at how many the likeliest token is not stock's.
        ties: at how many of these stock's two best logits are within the rounding of the dtype.
        agreement: share of the positions whose likeliest token is stock's.
        kl_mean: mean divergence of the method from stock, in nats.
        kl_max: the largest.
        kl_to_float32: mean divergence from the float32 reference; None without one.
        stock_kl_to_float32: stock's own.
        pass_tokens: tokens of a pass of the method.
        stock_pass_tokens: tokens of a pass of stock and of the float32 reference.
    """

    method: str
    context_tokens: int
    exact: bool
    status: Status
    reason: str = ""
    note: str = ""
    positions: int | None = None
    differing: int | None = None
    ties: int | None = None
    agreement: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    kl_to_float32: float | None = None
    stock_kl_to_float32: float | None = None
    pass_tokens: int | None = None
    stock_pass_tokens: int | None = None


class Agreement:
    """A run over all methods and contexts of a spec.

    Args:
        spec: what is compared.
        model: in eval mode, where it computes; left as it was.
        tokens: of the whole text, `[1, tokens]`, on the model's device.
        progress: told of every row.
        done: method and context of rows that an earlier run finished.

    Raises:
        HeadInferError: the text is too short, or the model cannot read it in several calls.
    """

    def __init__(
        self,
        spec: AgreementSpec,
        model: PreTrainedModel,
        tokens: torch.Tensor,
        progress: Progress,
        *,
        done: Collection[tuple[str, int]] = (),
    ) -> None:
        spec.check_text(tokens.shape[1])
        check_text(model, tokens)
        self._spec = spec
        self._stock = model
        self._other = sharing_weights(model)
        self._precise = copy.deepcopy(model).float() if spec.beside_float32 else None
        self._tokens = tokens
        self._progress = progress
        self._done = done
        self._most_tokens = most_tokens(model)

    def rows(self) -> Iterator[AgreementRow]:
        """Yield the rows, each when it is finished."""
        missing = [
            (method, context)
            for context in self._spec.contexts
            for method in self._spec.methods
            if (method, context) not in self._done
        ]
        pace = Pace([context for _, context in missing])
        for method, context in missing:
            what = f"{method} over {counted_tokens(context)}"
            self._progress.started(what, pace.left_s())
            row = self._row(method, context, self._mover(what, pace))
            pace.finish(context, ran=row.positions is not None)
            self._progress.finished(what, row.reason or outcome(row))
            yield row

    def _mover(self, what: str, pace: Pace) -> Callable[[int], None]:
        def moved(done_tokens: int) -> None:
            said = f"{what}: {format_tokens(done_tokens)} done"
            self._progress.moved(said, pace.left_s(done_tokens))

        return moved

    def _row(self, method: str, context: int, moved: Callable[[int], None]) -> AgreementRow:
        exact = CATALOGUE[method].exact
        try:
            return self._compare(method, context, moved)
        except Exception as error:  # any error becomes a row
            failure = failure_of(error)
        return AgreementRow(
            method=method,
            context_tokens=context,
            exact=exact,
            status=failure.status,
            reason=failure.reason,
        )

    @torch.no_grad()
    def _compare(self, name: str, context: int, moved: Callable[[int], None]) -> AgreementRow:
        tokens = self._tokens[:, :context]
        tally = Tally(self._stock.dtype)
        stock_tokens = min(self._most_tokens, context)
        with closing(METHODS[name](self._other, self._spec.trial(name, context))) as method:
            wanted = method.pass_tokens(context)
            pass_tokens = min(wanted, stock_tokens)
            capped = (
                ""
                if pass_tokens == wanted
                else f"read in passes of {counted(pass_tokens, 'token')}"
            )
            readings = [_read_stock(self._stock, tokens, stock_tokens)]
            if self._precise is not None:
                readings.append(_read_stock(self._precise, tokens, stock_tokens))
            if name != REFERENCE_METHOD:  # it would be the same reading once more
                readings.append(read(self._other, method.new_cache(context), tokens, pass_tokens))
            for parts in aligned(readings):
                precise = None if self._precise is None else parts[1]
                tally.add(parts[0], parts[0] if name == REFERENCE_METHOD else parts[-1], precise)
                moved(tally.positions)
        return AgreementRow(
            method=name,
            context_tokens=context,
            exact=CATALOGUE[name].exact,
            status=Status.OK if self._agrees(name, tally) else Status.MISMATCH,
            note="; ".join(filter(None, (method.note, capped))),
            positions=tally.positions,
            differing=tally.differing,
            ties=tally.ties,
            agreement=1 - tally.differing / tally.positions,
            kl_mean=tally.from_stock.mean,
            kl_max=tally.from_stock.largest,
            kl_to_float32=None if self._precise is None else tally.from_float32.mean,
            stock_kl_to_float32=None if self._precise is None else tally.stock_from_float32.mean,
            pass_tokens=pass_tokens,
            stock_pass_tokens=stock_tokens,
        )

    def _agrees(self, method: str, tally: Tally) -> bool:
        """Whether a method is what it says it is.

        An exact one equals stock in float32, up to ties. In 16 bits it is as far from the float32
        reference as stock is.
        """
        if not CATALOGUE[method].exact:
            return True
        if self._spec.dtype == "float32":
            return tally.differing == tally.ties and tally.from_stock.largest <= EXACT_KL
        if self._precise is None:
            return not math.isnan(tally.from_stock.mean)
        return tally.from_float32.mean <= NO_FURTHER * tally.stock_from_float32.mean


def _read_stock(
    model: PreTrainedModel, tokens: torch.Tensor, pass_tokens: int
) -> Iterator[torch.Tensor]:
    return read(model, DynamicCache(config=model.config), tokens, pass_tokens)


def outcome(row: AgreementRow) -> str:
    """Return a row's result in a few words."""
    assert row.positions is not None
    assert row.differing is not None
    wrong = "WRONG RESULT: " if row.status is Status.MISMATCH else ""
    return f"{wrong}{row.positions - row.differing:,} of {row.positions:,} tokens are stock's"
