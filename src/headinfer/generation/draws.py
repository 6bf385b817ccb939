"""Random numbers of one answer, apart from torch's global generator, which all threads share.

transformers draws tokens from that generator, between the model's calls and outside all turns. So
what a thread seeds another one uses up. A mode of torch is of one thread alone: it hands a
generator of its own to whatever draws. The numbers are those that the same seed gives without it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from headinfer.errors import OptionError
from headinfer.integration.watchers import Watcher

_SEEDS = range(-(2**63), 2**64)


def check_seed(seed: object) -> None:
    """Refuse a seed that torch's generators do not take; None is no seed.

    Raises:
        OptionError: says what a seed is.
    """
    whole = isinstance(seed, int) and not isinstance(seed, bool)
    if seed is not None and not (whole and seed in _SEEDS):
        raise OptionError(f"seed must be a whole number from -2**63 to 2**64 - 1, not {seed!r}")


def shared_ahead(device: torch.device) -> torch.Generator:
    """Return a generator of what torch's own gives next on a device; it is the caller's."""
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        return copied(torch.cuda.default_generators[number])
    return copied(torch.default_generator)


def copied(generator: torch.Generator) -> torch.Generator:
    """Return a generator that goes on as another one does."""
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy


class OwnDraws(Watcher, TorchFunctionMode):
    """A source of random numbers for one call of a model's `generate`.

    It is at work from when scores are processed until it is asked whether to stop: there tokens are
    drawn. So the model itself never computes under it.

    Args:
        seed: of the numbers; the same one gives the same numbers.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._entered = False

    def begin(self) -> None:
        """Be at rest in a call of the model."""
        self.leave()

    def processor(self, _input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Begin, as a logits processor that changes nothing."""
        if not self._entered:
            self._entered = True
            self.__enter__()  # type: ignore[no-untyped-call]  # torch's
        return scores

    def criterion(self, input_ids: torch.Tensor, _scores: Any, **_keywords: Any) -> torch.Tensor:
        """End, as a stopping criterion that stops nothing."""
        self.leave()
        return input_ids.new_zeros(input_ids.shape[0], dtype=torch.bool)

    def ahead(self, device: torch.device) -> torch.Generator:
        """Return a generator of the numbers that will come next on a device; it is the caller's."""
        return copied(self._generator(device))

    def leave(self) -> None:
        """Be at rest until scores are processed again."""
        if self._entered:
            self._entered = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch's

    def __torch_function__(
        self,
        function: Callable[..., Any],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, with a generator of this answer where it draws."""
        keywords = dict(kwargs or {})
        if function is torch.multinomial:
            keywords["generator"] = self._generator(args[0].device)
        elif function is torch.rand_like:
            like = args[0]
            return torch.rand(
                like.shape,
                generator=self._generator(like.device),
                dtype=like.dtype,
                device=like.device,
            )
        return function(*args, **keywords)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]
