"""The host's share of captured steps: asked for by flags, and attended by a thread of our own.

A step raises a flag once a layer's query is in host memory, and waits for another one. Each layer
has two of its own, which are down again when the step ends. What is asked is in memory, too: the
host's part grows without a new capture.
"""

import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch

from headinfer.attend.native.server import AttendTask, FlagServer
from headinfer.attend.partial import Partial
from headinfer.device.base import Device, Edge, Event, PlaceError
from headinfer.engine.chunk import Chunk
from headinfer.engine.host_attention import Exchange, HostAttention, tell_listeners
from headinfer.engine.one_launch_share import StepTimes
from headinfer.engine.stats import Stats
from headinfer.kv.ledger import Ledger
from headinfer.schedule.steps import Ask

_FLAG_BYTES = torch.int64.itemsize

_LEAST_LAYERS = 4
"""Layers that ask, at least, so that the least time between two of them tells something."""


class _Asked(NamedTuple):
    """A question for one layer, and what it was made of."""

    exchange: Exchange
    ledger: Ledger
    version: int
    step: Ask
    num_bytes: int

    def is_of(self, ledger: Ledger, step: Ask) -> bool:
        """Whether a step of a layer asks the very same."""
        return self.ledger is ledger and (self.version, self.step) == (ledger.version, step)


class FlaggedHost:
    """A server of the host's attention, and what captured steps of one cache ask it.

    Args:
        device: what asks.
        host: gives the memory for queries and answers.
        stats: where bytes and seconds are counted.
        count: layers that ask, in a step's order.
    """

    def __init__(self, device: Device, host: HostAttention, stats: Stats, count: int) -> None:
        self._device, self._host, self._stats = device, host, stats
        with torch.inference_mode(False):  # or they could not be written to outside it
            memory = device.host_empty(2 * count * _FLAG_BYTES).zero_()
            flags = memory.view(torch.int64).view(2, count)
            self._flags = device.mapped(memory).view(torch.int64).view(2, count, 1)
        self.server = FlagServer(flags)
        self._asked: list[_Asked | None] = [None] * count
        self._replayed = False  # whether a step was, whose times nobody was told
        device.serve(self.server)

    @property
    def count(self) -> int:
        """Layers that ask."""
        return len(self._asked)

    def expect(self) -> None:
        """Wake the thread: a step is about to be enqueued."""
        self._count_times()
        self.server.expect()

    def ask(self, index: int, ledger: Ledger, step: Ask, chunk: Chunk) -> "Answering":
        """Enqueue a layer's question, before what shall run meanwhile.

        Args:
            index: of the layer, among those that ask.
            ledger: of the layer.
            step: which tokens.
            chunk: has the query.

        Raises:
            PlaceError: no compiled kernel attends them.
        """
        compute, host_work = self._device.compute, self._device.host_work
        query = chunk.query.contiguous()
        if chunk.host_kernels is None:
            raise PlaceError("nothing attends on the host")
        exchange = self._host.exchange(
            query, ledger.geometry.value_dim, chunk.host_kernels, chunk.scale
        )
        self._set(index, exchange, ledger, step)
        compute.writes(query, "the query")
        host_work.wait(compute.record(), Edge.QUERY_READY)
        host_work.copy(exchange.query, query)
        asks, answers = self._flags
        host_work.raise_flag(asks[index])
        host_work.await_flag(answers[index], Edge.SERVED)
        host_work.lower_flag(answers[index])
        return Answering(query, exchange, host_work.record())

    def answer(self, asked: "Answering") -> Partial:
        """Hold compute until the host has answered; return the partial where compute reads it."""
        self._device.compute.wait(asked.answered, Edge.ANSWERED)
        self._device.compute.reads(asked.exchange.answer, "the host's partial result")
        return asked.exchange.on_device

    def refresh(self, steps: Sequence[tuple[Ledger, Ask]]) -> None:
        """Have the thread attend what a step's layers ask by now, in the same order.

        Waits for steps under way where that is something else than before.
        """
        settled = False
        for index, (ledger, step) in enumerate(steps):
            asked = self._asked[index]
            if asked is None or asked.is_of(ledger, step):
                continue
            if not settled:
                self._device.finish_compute()
                self._count_times()  # before the jobs go that know them
                settled = True
            self._set(index, asked.exchange, ledger, step)

    def _set(self, index: int, exchange: Exchange, ledger: Ledger, step: Ask) -> None:
        asked = self._asked[index]
        if asked is not None:
            if asked.exchange is not exchange:
                raise PlaceError("the host is asked by other queries than before")
            if asked.is_of(ledger, step):
                return
        tiles = list(ledger.host_tiles(step.start, step.end))
        job = None if exchange.jobs is None else exchange.jobs.make(tiles)
        if job is None:
            raise PlaceError("the host attends by no compiled kernel")
        read = (exchange.query, *(part for tile in tiles for part in (*tile.kv, *tile.piece.raw)))
        before = self.server.tasks[index]
        self.server.set_task(index, AttendTask(job, read, (exchange.answer,)))
        if before is not None:
            before.job.release()
        num_bytes = ledger.home.num_bytes(step.end - step.start)
        self._asked[index] = _Asked(exchange, ledger, ledger.version, step, num_bytes)

    def count_step(self) -> None:
        """Count the bytes of a step that was replayed."""
        self._replayed = True
        self._stats.bytes_attended_on_host += sum(
            asked.num_bytes for asked in self._asked if asked is not None
        )

    def _count_times(self) -> None:
        """Count the seconds of what the thread has done since, before it begins anew."""
        for task in self.server.tasks:
            if task is not None and task.job.finished:
                start_s, end_s = task.job.times
                task.job.block.finished = 0
                self._stats.host_attention_s += end_s - start_s
                tell_listeners(start_s, end_s)

    def times(self) -> StepTimes | None:
        """Return what the thread measured in a step that was replayed; None where that was told."""
        jobs = [task.job for task in self.server.tasks if task is not None]
        ran, self._replayed = self._replayed and all(job.finished for job in jobs), False
        if not ran or len(jobs) < _LEAST_LAYERS:
            return None
        times = [job.times for job in jobs]
        waits = [start_s - end_s for (_, end_s), (start_s, _) in itertools.pairwise(times)]
        host_s = statistics.fmean(end_s - start_s for start_s, end_s in times)
        return StepTimes(host_s, statistics.fmean(waits), min(waits))

    def rest(self) -> None:
        """Sleep until the thread has answered all of the step that was enqueued last."""
        self.server.rest()

    def end(self) -> None:
        """End the thread; no step may be under way."""
        try:
            self._count_times()
        finally:
            self.server.end()


class Answering(NamedTuple):
    """A question on its way to its answer.

    The query is kept until compute waits for the answer: only then may its memory be used again.
    """

    query: torch.Tensor
    exchange: Exchange
    answered: Event
