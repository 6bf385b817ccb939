"""What one process answers: a method at one context. Pure Python, never torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from headinfer.bench.model_spec import DTYPE_BYTES, Model, model_from_json
from headinfer.bench.spec import TrialSpec, check_lists, json_values
from headinfer.bench.variant import variant_of
from headinfer.errors import OptionError
from headinfer.evaluate.answers.task import Task, task_from_json
from headinfer.plan.options import Options


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """A job of one process: the questions of a task at one context, under one method.

    Attributes:
        task: as JSON values.
        method: name in `headinfer.bench.catalogue.CATALOGUE`.
        context_tokens: the most tokens of a prompt.
        new_tokens: the most tokens of the answers in one cache.
        dtype: of weights and KV cache.
        model: the model.
        settings: where to run and how to offload, where the method leaves it open.
        limit_tokens: the most tokens that the method holds; None where no limit was met.
        done: names of questions that are answered already.
        threads: CPU threads; None to leave them to torch.
    """

    task: Mapping[str, Any]
    method: str
    context_tokens: int
    new_tokens: int
    dtype: str
    model: Model
    settings: Options
    limit_tokens: int | None = None
    done: tuple[str, ...] = ()
    threads: int | None = None

    def trial(self) -> TrialSpec:
        """Return what a method of the benchmarks is made from."""
        all_tokens = self.context_tokens + self.new_tokens
        if self.limit_tokens is not None:
            all_tokens = min(all_tokens, self.limit_tokens)
        return TrialSpec(
            method=self.method,
            context_tokens=all_tokens - self.new_tokens,
            new_tokens=self.new_tokens,
            dtype=self.dtype,
            seed=0,
            model=self.model,
            settings=variant_of(self.method, self.settings.kv_cache).settings(self.settings),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON values."""
        values: dict[str, Any] = json_values(asdict(self))
        return values | {"settings": self.settings.keywords()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "JobSpec":
        """Return the job that `to_json` gave."""
        parts = {
            "model": model_from_json(values["model"]),
            "settings": Options.parse(**values["settings"]),
            "done": tuple(values["done"]),
        }
        return cls(**(dict(values) | parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersSpec:
    """A whole run: methods x contexts, with the questions of one task.

    Attributes:
        task: asks the questions.
        methods: names of methods, in the order of the rows.
        contexts: the most tokens of a prompt.
        dtype: of weights and KV cache.
        model: the model.
        settings: where to run and how to offload. `device` and `device_memory` hold for every
            method, the others where a method leaves them open.
        threads: CPU threads; None to leave them to torch.

    Raises:
        OptionError: a value is out of range.
    """

    task: Task
    methods: tuple[str, ...]
    contexts: tuple[int, ...]
    dtype: str
    model: Model
    settings: Options
    threads: int | None = None

    def __post_init__(self) -> None:
        check_lists(self.methods, self.contexts)
        if self.dtype not in DTYPE_BYTES:
            raise OptionError(f"dtype must be one of {', '.join(DTYPE_BYTES)}, not {self.dtype!r}")

    def job(
        self, method: str, context_tokens: int, limit_tokens: int | None, done: tuple[str, ...]
    ) -> JobSpec:
        """Return the job of one method at one context."""
        return JobSpec(
            task=self.task.to_json(),
            method=method,
            context_tokens=context_tokens,
            new_tokens=self.task.max_new_tokens,
            dtype=self.dtype,
            model=self.model,
            settings=self.settings,
            limit_tokens=limit_tokens,
            done=done,
            threads=self.threads,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the run as JSON values."""
        values: dict[str, Any] = json_values(
            {
                "task": self.task.to_json(),
                "methods": self.methods,
                "contexts": self.contexts,
                "dtype": self.dtype,
                "model": asdict(self.model),
                "threads": self.threads,
            }
        )
        return values | {"settings": self.settings.keywords()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "AnswersSpec":
        """Return the run that `to_json` gave."""
        parts = {
            "task": task_from_json(values["task"]),
            "methods": tuple(values["methods"]),
            "contexts": tuple(values["contexts"]),
            "model": model_from_json(values["model"]),
            "settings": Options.parse(**values["settings"]),
        }
        return cls(**(dict(values) | parts))
