"""One job, in a fresh process: the model is loaded, and every question answered in turn."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import torch

from headinfer.bench.build import torch_device
from headinfer.bench.limits import limit_device, limit_host
from headinfer.bench.machine import hardware
from headinfer.bench.methods import METHODS
from headinfer.bench.result import to_json
from headinfer.bench.trial import failure_of
from headinfer.errors import ModelLoadError
from headinfer.evaluate.answers.answering import Answerer
from headinfer.evaluate.answers.job import JobSpec
from headinfer.evaluate.answers.record import Record
from headinfer.evaluate.answers.task import task_from_json
from headinfer.generation.model import ModelSource, load_config, load_model, load_tokenizer
from headinfer.integration.model_shape import model_shape
from headinfer.plan.options import Options


def answer(values: dict[str, Any]) -> dict[str, Any]:
    """Return the kind of device that a run computes on, and the hardware.

    Args:
        values: the `device` of the settings; see `headinfer.bench.child`.
    """
    device = torch_device(Options.parse(device=values["device"]))
    return {"device": device.type, "hardware": hardware(device)}


def answers(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what a job gives: notes, a record for each question, and what ended it early.

    Args:
        values: a `JobSpec`'s; see `headinfer.bench.child`.
    """
    with suppress(OSError):
        # When memory runs out, this process is to die and not the one that started it.
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        for given in _run(JobSpec.from_json(values)):
            yield {"record": given.to_json()} if isinstance(given, Record) else {"note": given}
    except Exception as error:  # any error becomes a row
        yield {"failure": to_json(failure_of(error))}


def _run(job: JobSpec) -> Iterator[Record | str]:
    """Yield notes for the user, and records."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    torch.set_flush_denormal(True)  # softmax makes such numbers; some CPUs take 100 times as long
    device = torch_device(job.settings)
    limit_device(job.settings, [device])
    location = getattr(job.model, "location", None)
    if location is None:
        raise ModelLoadError(f"{job.model.description}: questions need a model with weights")
    source = ModelSource(name=location, load_in=getattr(job.model, "load_in", None))
    tokenizer = load_tokenizer(source)
    model, note = load_model(source, load_config(source), dtype=job.dtype, device=device.type)
    task = task_from_json(job.task)
    with closing(METHODS[job.method](model, job.trial())) as method:
        yield from filter(None, (note, method.note))
        answerer = Answerer(model, tokenizer, method, job.limit_tokens)
        answerer.warm_up()  # what libraries keep from a first call is nobody's KV or activations
        with ExitStack() as held:
            limit = limit_host(job.method, job.settings, device, model_shape(model).weights_bytes)
            # The libraries and texts of a task are nobody's KV either, and are loaded by then.
            answerer.before_next_cache(lambda: held.enter_context(limit))
            yield from task.records(job.context_tokens, answerer, job.done)
