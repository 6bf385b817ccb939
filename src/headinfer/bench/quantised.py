"""What people use instead: the quantised caches of transformers."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel, cache_utils
from transformers import __version__ as transformers_version
from transformers.cache_utils import Cache, QuantizedCache

from headinfer.bench.catalogue import QUANTISED_BACKENDS
from headinfer.bench.held import Held
from headinfer.bench.spec import TrialSpec
from headinfer.bench.stock import Standard
from headinfer.errors import OptionError


@dataclass(frozen=True, slots=True)
class _Library:
    """A library of a backend.

    Attributes:
        modules: that it needs.
        install: what a user types to have them.
        axis: along which it quantises keys and values, as transformers advises; None for one
            scale of a whole layer.
    """

    modules: tuple[str, ...]
    install: str
    axis: int | None


_LIBRARIES = {
    "quanto": _Library(("optimum.quanto", "optimum"), "pip install optimum optimum-quanto", 0),
    "hqq": _Library(("hqq",), "pip install hqq", 1),
    "fp8": _Library((), "pip install -U transformers", None),
}

_FOUR_BITS = 4


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package it would be in
        return False


def _lacks(backend: str) -> bool:
    if backend == "fp8":  # of transformers itself, and of newer ones alone
        return not hasattr(cache_utils, "Fp8QuantizedLayer")
    return not all(map(_installed, _LIBRARIES[backend].modules))


def check_backends(methods: Iterable[str]) -> None:
    """Check that the backends of some methods are installed.

    Raises:
        OptionError: one is not.
    """
    for method in methods:
        backend, _ = QUANTISED_BACKENDS.get(method, (None, 0))
        if backend is not None and _lacks(backend):
            raise OptionError(
                f"method {method!r} needs the backend {backend!r} of transformers' quantised "
                f"caches, which transformers {transformers_version} here lacks: "
                f"{_LIBRARIES[backend].install}"
            )


class Quantised(Standard):
    """A cache of few bits, unpacked layer by layer to be attended.

    Args:
        model: stock.
        spec: of the trial.
        method: name of one whose backend is chosen by it; None for 4 bits by what is installed.

    A prompt passes at once, and so attends nothing that was rounded. It passes in chunks where the
    method names its backend and `chunk_tokens` is given.

    Raises:
        ImportError: no library for 4 bits is installed.
        OptionError: the backend that is named is not installed.
    """

    def __init__(
        self, model: PreTrainedModel, spec: TrialSpec, *, method: str | None = None
    ) -> None:
        super().__init__(model, spec)
        given = spec.settings.chunk_tokens
        self._chunk_tokens = given if method is not None and given != "auto" else None
        if method is None:
            self._backend, self._bits = _any_of_four_bits(), _FOUR_BITS
        else:
            check_backends([method])
            self._backend, self._bits = QUANTISED_BACKENDS[method]
        self.note = f"{self._bits} bits by {self._backend}"

    def new_cache(self, max_tokens: int) -> Cache:
        """Return an empty cache."""
        axis = _LIBRARIES[self._backend].axis
        if axis is None:
            return QuantizedCache(self._backend, self._model.config)
        return QuantizedCache(
            self._backend, self._model.config, nbits=self._bits, axis_key=axis, axis_value=axis
        )

    def pass_tokens(self, context_tokens: int) -> int:
        """Return the tokens of a chunk, or all of them."""
        return min(self._chunk_tokens or context_tokens, context_tokens)

    def prefill(self, tokens: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Pass a prompt through the model, chunk by chunk where chunks are given."""
        *first, last = tokens.split(self.pass_tokens(tokens.shape[1]), dim=1)
        for part in first:
            super().prefill(part, cache)
        return super().prefill(last, cache)

    def held(self, cache: Cache) -> Held:
        """Return the bits of the elements; scales and zeros are not counted."""
        elements = sum(
            layer.elements_per_token for layer in self._spec.model.shape(self._spec.dtype).layers
        )
        held = cache.get_seq_length() * elements * self._bits // 8
        on_host = self._model.device.type == "cpu"
        return Held(host_bytes=held if on_host else 0, device_bytes=0 if on_host else held)


def _any_of_four_bits() -> str:
    for backend in ("quanto", "hqq"):
        if not _lacks(backend):
            return backend
    raise ImportError(
        "no library for quantised caches is installed: "
        f"{_LIBRARIES['quanto'].install} (or: {_LIBRARIES['hqq'].install})"
    )
