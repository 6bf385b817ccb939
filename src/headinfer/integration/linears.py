"""Products of a model's decode calls on the CPU, by a kernel that reads at the speed of memory."""

import contextlib
import types
import weakref
from collections.abc import Callable

import torch

from headinfer.integration.forward import OwnForwards
from headinfer.products.few_rows import DTYPES, MAX_ROWS, few_rows_library, product


class FewRowLinears:
    """A model's linear modules as computed by our kernel, in place only during calls of few rows.

    A module that has a `forward` of its own already, as accelerate gives it, is left alone, and so
    are subclasses, such as quantised ones.

    Args:
        model: may go while this stays.
        launch: of the device; has a function called, also in each replay of what is captured.
        enabled: whether to compute anything so.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        launch: Callable[[Callable[[], None]], None],
        *,
        enabled: bool,
    ) -> None:
        self._model = weakref.ref(model)
        self._launch = launch
        self._enabled = enabled
        self._forwards: OwnForwards | None = None

    def on(self, batch: int, new_tokens: int) -> contextlib.AbstractContextManager[object]:
        """Have the modules compute so until the `with` statement ends, if the rows are few.

        Args:
            batch: rows of the call.
            new_tokens: of each row. Products have one row for each token of all of them.
        """
        if not self._enabled or not 0 < batch * new_tokens <= MAX_ROWS:
            return contextlib.nullcontext()
        if self._forwards is None:
            self._forwards = OwnForwards(self._found())
        return self._forwards.on()

    def _found(self) -> list[types.MethodType]:
        model, forward = self._model(), _forward_by(self._launch)
        linears = (
            [] if model is None else (m for m in model.modules() if type(m) is torch.nn.Linear)
        )
        return [
            types.MethodType(forward, linear)
            for linear in linears
            if linear.weight.dtype in DTYPES and few_rows_library(linear.weight.dtype, 1)
        ]


def _forward_by(launch: Callable[[Callable[[], None]], None]) -> Callable[..., torch.Tensor]:
    """Return a linear module's `forward` that has a device launch our kernel."""

    # Its name is that of the method it stands for: what is pickled meanwhile has that method.
    def forward(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
        """Compute a module's output by our kernel where it serves, and as ever elsewhere."""
        parameters = self._parameters
        if not (
            torch.compiler.is_compiling()
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or "weight" not in parameters  # hooks compute it, as those of pruning do
            or "bias" not in parameters
        ):
            weight = parameters["weight"]
            work = None if weight is None else product(input, weight, parameters["bias"])
            if work is not None:
                launch(work)
                return work.output
        return torch.nn.Linear.forward(self, input)

    return forward
