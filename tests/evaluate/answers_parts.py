"""Questions, records and launchers small enough for tests."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from agreement_parts import Told
from transformers import PreTrainedModel

from headinfer.bench.methods import METHODS
from headinfer.bench.model_spec import NamedModel
from headinfer.bench.result import TrialFailure, TrialResult
from headinfer.bench.spec import TrialSpec
from headinfer.evaluate.answers.answering import Answerer
from headinfer.evaluate.answers.job import AnswersSpec, JobSpec
from headinfer.evaluate.answers.record import Answer, Record
from headinfer.evaluate.answers.run import AnswersRow, AnswersRun
from headinfer.integration.model_shape import model_shape
from headinfer.plan.options import Options
from saved_models import make_tokenizer
from tiny_models import shared_model

TOKENIZER = make_tokenizer()


def answering(
    model: PreTrainedModel,
    method: str = "standard",
    *,
    context_tokens: int = 200,
    limit_tokens: int | None = None,
) -> tuple[closing[Any], Answerer]:
    """Return a method in force on a model, to be closed, and an answerer."""
    spec = TrialSpec(
        method=method,
        context_tokens=context_tokens,
        new_tokens=20,
        dtype="float32",
        seed=0,
        model=None,
        settings=Options.parse(device="simulated", chunk_tokens="37", tile_tokens="16"),
    )
    in_force = METHODS[method](model, spec)
    return closing(in_force), Answerer(model, TOKENIZER, in_force, limit_tokens)


def answer(
    tokens: Sequence[int] = (5, 6), *, ties: Sequence[bool] | None = None, cut: int = 0
) -> Answer:
    return Answer(
        text="five six",
        tokens=tuple(tokens),
        ties=tuple(ties or [False] * len(tokens)),
        prompt_tokens=100,
        read_tokens=100 - cut,
        prefill_s=1.5,
        decode_s=0.5,
    )


def record(question: str, tokens: Sequence[int] = (5, 6), score: float = 1.0, **given) -> Record:
    return Record(
        question=question,
        expected=("five",),
        score=score,
        answer=answer(tokens, **given),
        labels={"depth": 0.5},
    )


@dataclass(frozen=True)
class Quiz:
    """A task of numbered questions."""

    samples: int = 3
    name: str = "needle"  # one that is known by name
    max_new_tokens: int = 4

    def questions(self, context_tokens: int) -> int:
        return self.samples

    def records(
        self, context_tokens: int, answerer: Any, done: Collection[str]
    ) -> Iterator[Record]:
        raise AssertionError("workers are fakes here")

    def told(self) -> list[str]:
        return []

    def scores(self, records: Sequence[Record]) -> dict[str, float | None]:
        return {}

    def remarks(self, records: Sequence[Record]) -> list[str]:
        return []

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Heard(Told):
    """A progress that may not know the time left, as while a method's limit is looked for."""

    def moved(self, what: str, left_s: float | None) -> None:
        self.lines.append(what)


Given = Record | TrialFailure | str


class FakeWorkers:
    """Answers jobs and trials from functions, and keeps what was asked."""

    def __init__(
        self,
        job: Callable[[JobSpec], Iterator[Given]],
        holds: Callable[[str], int] = lambda _method: 10**9,
    ) -> None:
        self._job, self._holds = job, holds
        self.jobs: list[JobSpec] = []
        self.trials: list[TrialSpec] = []

    def machine(self, device: str) -> Mapping[str, Any]:
        return {"device": "cpu", "hardware": {"cpu": "a processor", "gpu": None}}

    def job(self, job: JobSpec) -> Iterator[Given]:
        self.jobs.append(job)
        return self._job(job)

    def trial(self, spec: TrialSpec) -> TrialResult | TrialFailure:
        self.trials.append(spec)
        if spec.all_tokens > self._holds(spec.method):
            return lacks_memory()
        return TrialResult(
            device="cpu",
            prefill_s=None,
            decode_s=(1.0,),
            greedy_tokens=(1,),
            logits=(),
            peak_rss_growth_bytes=0,
            rss_source="made up",
            kv_host_bytes=0,
            kv_device_bytes=0,
        )


def lacks_memory() -> TrialFailure:
    from headinfer.bench.result import Status

    return TrialFailure(status=Status.CANNOT_RUN, reason="out of memory: a lot", grows=True)


def answers_spec(*methods: str, **changes: Any) -> AnswersSpec:
    shape = model_shape(shared_model("llama3"))
    given = {
        "task": Quiz(),
        "methods": methods,
        "contexts": (4096,),
        "dtype": "float32",
        "model": NamedModel(name="tiny", location="tiny", config=None, planned=shape),
        "settings": Options.parse(device="cpu"),
    }
    return AnswersSpec(**given | changes)


def run(
    spec: AnswersSpec, workers: FakeWorkers, progress: Any, rows: Sequence[AnswersRow] = ()
) -> dict[tuple[str, int], AnswersRow]:
    return {row.key: row for row in AnswersRun(spec, workers, progress, rows).rows()}
