"""What to measure: one trial, and a whole run. Pure Python, never torch."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from headinfer.bench.catalogue import CATALOGUE, Spread, spread_of
from headinfer.bench.model_spec import DTYPE_BYTES, Model, model_from_json
from headinfer.bench.replay import Replay
from headinfer.bench.variant import Variant, variants_of
from headinfer.errors import OptionError
from headinfer.plan.option_values import KVCacheName
from headinfer.plan.options import Options


class Command(str, enum.Enum):
    """What is looked for."""

    DECODE = "decode"
    PREFILL = "prefill"
    MEMORY = "memory"
    MAX_CONTEXT = "max-context"
    ABLATION = "ablation"

    @property
    def times_prefill(self) -> bool:
        """Whether bound and link rate are those of the prefill, not of decode steps."""
        return self is Command.PREFILL

    @property
    def finds_context(self) -> bool:
        """Whether contexts are looked for, not given."""
        return self is Command.MAX_CONTEXT


class Fill(str, enum.Enum):
    """How a cache comes to hold the prompt."""

    PREFILL = "prefill"
    """The prompt passes through the model."""

    RANDOM = "random"
    """Random keys and values, the same for each method, as the paper's decode measurements have."""

    RECORDED = "recorded"
    """Random ones whose exponents are distributed as those of real models, for codes of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSpec:
    """A trial in a fresh process: one method, one prompt, some decode steps.

    Attributes:
        method: name in `headinfer.bench.catalogue.CATALOGUE`.
        context_tokens: tokens of the prompt.
        new_tokens: decode steps after it.
        dtype: of weights and KV cache.
        seed: of the weights and, offset by one, of the tokens.
        model: the model.
        settings: where to run and how to offload. `device` and `device_memory` hold for every
            method, the others where a method leaves them open.
        fill: how the cache comes to hold the prompt.
        last_pass: whether the prompt's last pass through the model is a real one also where the
            rest is filled at random. A method that does not chunk has all of the prompt in that
            pass.
        gpus: of the run; a method may use one of them.
        replay: what verifications of drafts accept; None for methods without drafts.
    """

    method: str
    context_tokens: int
    new_tokens: int
    dtype: str
    seed: int
    model: Model
    settings: Options
    fill: Fill = Fill.PREFILL
    last_pass: bool = False
    gpus: int = 1
    replay: Replay | None = None

    @property
    def spread(self) -> Spread:
        """How the model lies on the GPUs."""
        return spread_of(self.method, self.gpus)

    @property
    def all_tokens(self) -> int:
        """Tokens in the cache at the end."""
        return self.context_tokens + self.new_tokens

    def to_json(self) -> dict[str, Any]:
        """Return the trial as JSON values."""
        return _spec_values(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrialSpec":
        """Return the trial that `to_json` gave."""
        parts = {
            "model": model_from_json(values["model"]),
            "settings": Options.parse(**values["settings"]),
            "fill": Fill(values["fill"]),
            "replay": Replay.from_json(values.get("replay")),
        }
        return cls(**(dict(values) | parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSpec:
    """A whole run: methods x forms x contexts x repeats.

    Attributes:
        command: what is looked for.
        methods: names of methods, in the order of the rows.
        contexts: tokens of the prompts; for the longest context the least and the most to try.
        new_tokens: decode steps of each trial.
        repeats: fresh processes for each row.
        dtype: of weights and KV cache.
        seed: of weights and tokens.
        model: the model.
        settings: where to run and how to offload. `device` and `device_memory` hold for every
            method, the others where a method leaves them open. The form of KV is not among them.
        kv_caches: forms of KV in CPU memory, for each method that leaves a choice.
        fill: how caches come to hold the prompt.
        time_limit_s: a trial that takes longer is ended.
        gpus: that methods may spread the model over; `device_memory` is of each.
        replay: what verifications of drafts accept; None for methods without drafts.

    Raises:
        OptionError: a value is out of range.
    """

    command: Command
    methods: tuple[str, ...]
    contexts: tuple[int, ...]
    new_tokens: int
    repeats: int
    dtype: str
    model: Model
    seed: int = 0
    settings: Options = field(default_factory=Options)
    kv_caches: tuple[KVCacheName, ...] = ("auto",)
    fill: Fill = Fill.PREFILL
    time_limit_s: int = 3600
    gpus: int = 1
    replay: Replay | None = None

    def __post_init__(self) -> None:
        for name in ("new_tokens", "repeats", "time_limit_s", "gpus"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in DTYPE_BYTES:
            raise OptionError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {self.dtype!r}")
        check_lists(self.methods, self.contexts)
        self._check_forms()
        self._check_gpus()
        if self.command.finds_context and len(self.contexts) > 2:
            raise OptionError(
                f"{self.command.value} takes one or two contexts, the first and the longest to "
                f"try, and not {len(self.contexts)}; leave out those between"
            )

    def _check_forms(self) -> None:
        assert self.settings.kv_cache == "auto", "forms are in kv_caches"
        listed = ",".join(self.kv_caches)
        if len(set(self.kv_caches)) < len(self.kv_caches):
            raise OptionError(f"a form is named twice in --kv-cache {listed}")
        if self.kv_caches != ("auto",) and not any(
            CATALOGUE[method].takes_forms for method in self.methods
        ):
            raise OptionError(
                f"--kv-cache {listed} has no effect on {', '.join(self.methods)}; leave it out, or "
                "name another method"
            )

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Methods with forms, in the order of the rows."""
        return tuple(variants_of(self.methods, self.kv_caches))

    @property
    def compares_forms(self) -> bool:
        """Whether `dense` is among several forms, so that others are compared with it."""
        return len(self.kv_caches) > 1 and "dense" in self.kv_caches

    def name_of(self, variant: Variant) -> str:
        """Return what tables call a variant: by its method alone where there is one form."""
        return variant.name if len(self.kv_caches) > 1 else variant.method

    def _check_gpus(self) -> None:
        several = [name for name in self.methods if CATALOGUE[name].needs_several]
        if several and self.gpus == 1:
            raise OptionError(f"method {several[0]!r} needs several GPUs: give --gpus 2 or more")
        if several and self.gpus > self.model.layers:
            raise OptionError(
                f"there are {self.gpus} GPUs, and layers of the model: {self.model.layers}; give "
                "at most as many GPUs"
            )
        if self.settings.device_memory_each:
            raise OptionError(
                "benchmarks take one --device-memory, which holds for each GPU, and not a list"
            )

    def trial(self, variant: Variant, context_tokens: int) -> TrialSpec:
        """Return the trial of one method, in one form, at one context."""
        return TrialSpec(
            method=variant.method,
            context_tokens=context_tokens,
            new_tokens=self.new_tokens,
            dtype=self.dtype,
            seed=self.seed,
            model=self.model,
            settings=variant.settings(self.settings),
            fill=self.fill,
            last_pass=self.command.finds_context,
            gpus=self.gpus,
            replay=self.replay,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the run as JSON values."""
        return _spec_values(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "BenchSpec":
        """Return the run that `to_json` gave; runs of one form had it among their settings."""
        settings = Options.parse(**values["settings"])
        parts = {
            "command": Command(values["command"]),
            "methods": tuple(values["methods"]),
            "contexts": tuple(values["contexts"]),
            "model": model_from_json(values["model"]),
            "settings": replace(settings, kv_cache="auto"),
            "kv_caches": tuple(values.get("kv_caches", (settings.kv_cache,))),
            "fill": Fill(values["fill"]),
            "replay": Replay.from_json(values.get("replay")),
        }
        return cls(**(dict(values) | parts))


def check_lists(methods: Sequence[str], contexts: Sequence[int]) -> None:
    """Check that there are methods and contexts, each named once.

    Raises:
        OptionError: there are none, or one is named twice.
    """
    lists: tuple[tuple[str, Sequence[object]], ...] = (("method", methods), ("context", contexts))
    for what, given in lists:
        if not given:
            raise OptionError(f"no {what}s were given; name at least one")
        if len(set(given)) < len(given):
            listed = ",".join(map(str, given))
            raise OptionError(f"a {what} is named twice in {listed!r}")


def _spec_values(spec: "TrialSpec | BenchSpec") -> dict[str, Any]:
    values: dict[str, Any] = json_values(asdict(spec))
    return values | {"settings": spec.settings.keywords()}


def json_values(value: Any) -> Any:
    """Return a value with enums as their values; NaN, which JSON lacks, as None."""
    if isinstance(value, Mapping):
        return {name: json_values(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(part) for part in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, float) and value != value:
        return None
    return value
