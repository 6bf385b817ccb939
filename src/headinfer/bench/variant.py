"""A method together with the form of its KV in CPU memory: what a row is of. Pure Python."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from headinfer.bench.catalogue import AUTO, CATALOGUE, REFERENCE_METHOD
from headinfer.plan.format import Format
from headinfer.plan.option_values import KVCacheName
from headinfer.plan.options import Options


@dataclass(frozen=True, slots=True)
class Variant:
    """A method with a form of KV in CPU memory.

    Attributes:
        method: name in the catalogue.
        kv_cache: the form that is asked for; None where the method leaves no choice.
    """

    method: str
    kv_cache: KVCacheName | None = None

    @property
    def name(self) -> str:
        """The method's name, and that of the form where one was asked for."""
        return self.method if self.kv_cache in (None, "auto") else f"{self.method} {self.kv_cache}"

    def settings(self, settings: Options) -> Options:
        """Return what it is attached with, of a run's settings.

        Where no form was named `headinfer` is what users get. Other methods are dense, so that
        their numbers differ by what their names say.
        """
        if self.kv_cache is None:
            return settings
        is_open = self.kv_cache == "auto" and self.method != AUTO
        return replace(settings, kv_cache="dense" if is_open else self.kv_cache)

    @property
    def exact(self) -> bool:
        """Whether its results must be the reference's."""
        rounds = self.kv_cache not in (None, "auto") and Format(self.kv_cache).code is not None
        return CATALOGUE[self.method].exact and not rounds


REFERENCE = Variant(REFERENCE_METHOD)


def variant_of(method: str, kv_cache: KVCacheName) -> Variant:
    """Return a method with a form, which it may not have a choice of."""
    return Variant(method, kv_cache if CATALOGUE[method].takes_forms else None)


def variants_of(methods: Sequence[str], kv_caches: Sequence[KVCacheName]) -> Iterator[Variant]:
    """Yield methods with forms in the order of tables, each once."""
    yield from dict.fromkeys(
        variant_of(method, kv_cache) for method in methods for kv_cache in kv_caches
    )
