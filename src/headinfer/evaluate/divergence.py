"""How far the logits of one reading are from those of another, over all positions of a text."""

import math

import torch

_SLICE_BYTES = 32 * 2**20
"""Bytes of float64 logits that are looked at together; a few tensors of this size exist at once."""


def divergences(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the Kullback-Leibler divergence at each position, in float64.

    Args:
        reference: logits `[positions, vocab]` of the distribution that is taken for the true one.
        other: those of the one that stands in for it.

    Returns:
        Nats `[positions]`, NaN where logits are.
    """
    true, given = (logits.double().log_softmax(dim=-1) for logits in (reference, other))
    weights = true.exp()
    # A token that the reference rules out adds nothing, also where both are minus infinity.
    terms = torch.where(weights == 0, 0.0, weights * (true - given))
    return terms.sum(dim=-1).clamp(min=0)  # below 0 is float64's own rounding


def tied(logits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return at which positions the two best logits are within one rounding of a dtype.

    Args:
        logits: `[positions, vocab]`.
        dtype: that they were computed in.
    """
    best = logits.double().topk(min(2, logits.shape[-1]), dim=-1).values
    return best[:, 0] - best[:, -1] <= torch.finfo(dtype).eps * best.abs().amax(dim=-1)


class _Running:
    """A mean and a maximum of values that come in parts; NaN once a value is."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._count = 0
        self.largest = 0.0

    def add(self, values: torch.Tensor) -> None:
        """Take in values `[n]`."""
        self._sum += float(values.sum())
        self._count += len(values)
        largest = float(values.max())
        if largest > self.largest or math.isnan(largest):  # nothing is above NaN, which stays
            self.largest = largest

    @property
    def mean(self) -> float:
        """Mean of all values."""
        return self._sum / self._count


class Tally:
    """A comparison of a method with stock, that is given the logits of a text part by part.

    Attributes:
        positions: how many were compared.
        differing: at how many of them the likeliest token is another than stock's.
        ties: at how many of the differing ones stock's two best logits are tied.
        from_stock: divergences of the method from stock.
        from_float32: those of the method from the float32 reference, where there is one.
        stock_from_float32: those of stock from it.

    Args:
        dtype: of the logits.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.positions = 0
        self.differing = 0
        self.ties = 0
        self.from_stock = _Running()
        self.from_float32 = _Running()
        self.stock_from_float32 = _Running()

    def add(
        self, stock: torch.Tensor, method: torch.Tensor, precise: torch.Tensor | None = None
    ) -> None:
        """Take in some positions.

        Args:
            stock: logits `[positions, vocab]` of the reference.
            method: those of the method.
            precise: those of the float32 reference, if there is one.
        """
        rows = max(1, _SLICE_BYTES // (stock.shape[-1] * torch.float64.itemsize))
        for start in range(0, len(stock), rows):
            part = slice(start, start + rows)
            self._add(stock[part], method[part], None if precise is None else precise[part])

    def _add(self, stock: torch.Tensor, method: torch.Tensor, precise: torch.Tensor | None) -> None:
        differing = stock.argmax(dim=-1) != method.argmax(dim=-1)
        differing |= method.isnan().any(dim=-1)
        self.positions += len(stock)
        self.differing += int(differing.sum())
        self.ties += int((differing & tied(stock, self._dtype)).sum())
        self.from_stock.add(divergences(stock, method))
        if precise is not None:
            self.from_float32.add(divergences(precise, method))
            self.stock_from_float32.add(divergences(precise, stock))
