"""What an evaluation compares. Pure Python, never torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headinfer.bench.model_spec import Model, model_from_json
from headinfer.bench.spec import TrialSpec, check_lists, json_values
from headinfer.bench.variant import variant_of
from headinfer.errors import OptionError
from headinfer.plan.options import Options
from headinfer.units import counted


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementSpec:
    """A comparison of methods with stock over the beginnings of one text.

    Attributes:
        methods: names in `headinfer.bench.catalogue.CATALOGUE`, in the order of the rows.
        contexts: tokens of each beginning.
        dtype: of weights and KV cache.
        model: the model.
        settings: where to run and how to offload, where a method leaves it open.
        float32: whether 16-bit results are also held against the same weights in float32.
        adapter: a LoRA on the model: a folder or the id of one; None for none.

    Raises:
        OptionError: a value is out of range.
    """

    methods: tuple[str, ...]
    contexts: tuple[int, ...]
    dtype: str
    model: Model
    settings: Options
    float32: bool = True
    adapter: str | None = None

    def __post_init__(self) -> None:
        check_lists(self.methods, self.contexts)
        if min(self.contexts) < 1:
            raise OptionError(f"a context has at least 1 token, not {min(self.contexts)}")

    @property
    def beside_float32(self) -> bool:
        """Whether there is a float32 reference beside stock."""
        return self.float32 and self.dtype != "float32"

    def check_text(self, text_tokens: int) -> None:
        """Check that a text is long enough.

        Raises:
            OptionError: it is not.
        """
        if text_tokens < max(self.contexts):
            raise OptionError(
                f"the text has {counted(text_tokens, 'token')}, and contexts go to "
                f"{max(self.contexts):,}; give a longer text or smaller --contexts"
            )

    def trial(self, method: str, context_tokens: int) -> TrialSpec:
        """Return what a method of the benchmarks is made from."""
        return TrialSpec(
            method=method,
            context_tokens=context_tokens,
            new_tokens=0,
            dtype=self.dtype,
            seed=0,
            model=self.model,
            settings=variant_of(method, self.settings.kv_cache).settings(self.settings),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        values: dict[str, Any] = json_values(asdict(self))
        return values | {"settings": self.settings.keywords()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "AgreementSpec":
        """Return the comparison that `to_json` gave."""
        parts = {
            "methods": tuple(values["methods"]),
            "contexts": tuple(values["contexts"]),
            "model": model_from_json(values["model"]),
            "settings": Options.parse(**values["settings"]),
        }
        return cls(**(dict(values) | parts))
