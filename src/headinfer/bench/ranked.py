"""A trial whose model several processes share: starts them by torchrun's own API, and waits.

One of them may fail while the others wait for it in a library. torchrun then ends those, and what
the first one said is why the trial has no result.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from headinfer.bench.neighbours import Neighbours
from headinfer.bench.result import Status, TrialFailure, TrialResult, from_json, to_json
from headinfer.bench.spec import TrialSpec
from headinfer.bench.trial import die_first, failure_of
from headinfer.folders import temporary_folder
from headinfer.scratch import scratch_folder

TRIAL = "trial.json"
"""The file in a trial's folder that says what the ranks measure."""

_PROGRAM = "headinfer.bench.rank_program"

_SUMS = (
    "peak_rss_growth_bytes",
    "kv_host_bytes",
    "raw_page_bytes",
    "kv_device_bytes",
    "streamed_kv_bytes",
    "host_attended_kv_bytes",
    "unseen_kv_bytes",
    "kv_disk_bytes",
    "disk_read_bytes",
    "prefill_bytes_to_device",
    "prefill_bytes_to_host",
    "decode_bytes_to_device",
    "decode_bytes_to_host",
)
_MOST = (
    "prefill_s",
    "first_prefill_s",
    "planned_activation_bytes",
    "device_peak_allocated_bytes",
    "device_peak_reserved_bytes",
)


def answer_file(folder: Path, rank: int) -> Path:
    """Return the file that a rank writes its outcome to."""
    return folder / f"rank{rank}.json"


def answer(values: dict[str, Any]) -> dict[str, Any]:
    """Run the trial of a spec's JSON values in ranks; see `headinfer.bench.child`."""
    die_first()  # the ranks inherit it
    spec = TrialSpec.from_json(values)
    if spec.settings.device in ("cpu", "simulated"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # transformers takes a GPU wherever there is one
    neighbours = Neighbours()
    try:
        with scratch_folder(temporary_folder()) as folder:
            (folder / TRIAL).write_text(json.dumps(values))
            outcome = _launched(spec.gpus, folder)
    except Exception as error:  # any error becomes a row
        outcome = failure_of(error)
    if isinstance(outcome, TrialResult):
        outcome = replace(outcome, others_cpu_share=neighbours.cpu_share())
    return to_json(outcome)


def _launched(ranks: int, folder: Path) -> TrialResult | TrialFailure:
    """Return what the ranks found; they are started anew and have ended."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
    )
    exits: dict[int, int] = {}
    try:
        launch = elastic_launch(config, entrypoint=sys.executable)
        with _handlers_restored():
            launch("-m", _PROGRAM, str(folder), str(os.getpid()))
    except ChildFailedError as error:
        exits = {rank: failure.exitcode for rank, failure in error.failures.items()}
    answers = _answers(ranks, folder)
    results = [each for _at_s, each in answers.values() if isinstance(each, TrialResult)]
    return merged(results) if len(results) == ranks else _failure(exits, answers)


@contextlib.contextmanager
def _handlers_restored() -> Iterator[None]:
    """Put back the handlers of signals, which torch's launcher replaces and leaves so."""
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
    before = {each: signal.getsignal(each) for each in signals}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for each, handler in before.items():
                signal.signal(each, handler)


_Answers = Mapping[int, tuple[float, TrialResult | TrialFailure]]
"""When each rank wrote its outcome, and what; ranks that wrote nothing are not in it."""


def _answers(ranks: int, folder: Path) -> _Answers:
    """Return what the ranks wrote, in their order."""
    found = {}
    for rank in range(ranks):
        file = answer_file(folder, rank)
        if file.exists():
            values = json.loads(file.read_text())
            found[rank] = float(values["at_s"]), from_json(values["outcome"])
    return found


def _failure(exits: Mapping[int, int], answers: _Answers) -> TrialFailure:
    """Return why there is no result: whose failure came first, as far as that is known.

    Args:
        exits: exit codes by rank, of those that failed.
        answers: what ranks wrote.
    """
    for rank, code in exits.items():
        if code == -signal.SIGKILL:
            reason = f"rank {rank} was killed by the system, most likely for lack of memory"
            return TrialFailure(status=Status.CANNOT_RUN, reason=reason, grows=True)
    for rank, (_at_s, outcome) in sorted(answers.items(), key=lambda answer: answer[1][0]):
        if isinstance(outcome, TrialFailure):
            return replace(outcome, reason=f"rank {rank}: {outcome.reason}")
    codes = ", ".join(f"rank {rank} with status {code}" for rank, code in exits.items())
    return TrialFailure(status=Status.FAILED, reason=f"a process ended without a word: {codes}")


def merged(results: Sequence[TrialResult]) -> TrialResult:
    """Return the results of all ranks as one: the slowest's times, and the bytes of all."""
    first = results[0]
    values: dict[str, Any] = {
        name: sum(getattr(result, name) for result in results) for name in _SUMS
    }
    for name in _MOST:
        given = [getattr(result, name) for result in results]
        values[name] = max((each for each in given if each is not None), default=None)
    values["decode_s"] = tuple(map(max, zip(*(result.decode_s for result in results), strict=True)))
    values["parts"] = tuple(part for result in results for part in result.parts)
    return replace(first, **values)
