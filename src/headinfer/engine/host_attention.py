"""Attention where the bytes lie: the CPU attends some of a layer's tokens in host memory.

Only the query crosses the link, and only the partial result comes back. A kernel merges it like any
tile's, and reads it in host memory. As a copy the result waited for the tiles on their way: 0.6 ms
in a layer of 2.5 ms, beside an H100. Meanwhile the link brings other tokens, and the device attends
those and its resident ones. The CPU's attention is work in the order of a stream. So the caller's
thread never waits for it, and goes on to enqueue what follows. Where a compiled kernel serves, it
is a job in machine code; elsewhere a call of a kernel in Python.
"""

import collections
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from headinfer.attend.native.job import Jobs
from headinfer.attend.native.kernel import NativeKernel
from headinfer.attend.partial import Accumulator, Partial, accumulation_dtype
from headinfer.attend.table import Kernels
from headinfer.attend.work import Work
from headinfer.device.base import Device, Edge, Event
from headinfer.engine.balance import Balance, Balances
from headinfer.engine.packed_here import unpacked_works
from headinfer.engine.stats import Stats
from headinfer.kv.extent import Tile
from headinfer.kv.pair import Geometry

Listener = Callable[[float, float], None]

listeners: list[Listener] = []
"""Functions that are told when the CPU's share of a layer's attention began and ended.

Times are of `time.perf_counter`. The thread that calls the engine tells them when it next comes by:
torch's profiler does not see the thread that attended.
"""

_UNJUDGED = 64
"""Answers whose order is not known yet; older ones are forgotten."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A piece of memory through which queries of one shape go to the host, and answers come back.

    Owned by one `HostAttention` and reused from layer to layer. Both are in host memory. The
    host-work stream alone uses them, but compute reads the answer. The answer is an output and its
    LSE, one behind the other; `on_host` and `on_device` are views of it, as either addresses it.
    `jobs` attends in between, without Python; None where only the kernel can.
    """

    query: torch.Tensor
    answer: torch.Tensor
    on_host: Partial
    on_device: Partial
    jobs: Jobs | None

    @classmethod
    def allocate(
        cls, device: Device, query: torch.Tensor, value_dim: int, kernels: Kernels, scale: float
    ) -> "Exchange":
        """Take the memory for queries like `query`, and for their answers."""
        dtype = accumulation_dtype(query.dtype)
        rows = query.shape[:-1]
        num_bytes = rows.numel() * (value_dim + 1) * dtype.itemsize
        # A view that changes the dtype in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            answer = device.host_empty(num_bytes)
            memory = device.host_empty(query.numel() * query.dtype.itemsize)
            sent = memory.view(query.dtype).view(query.shape)
            on_host, on_device = (
                _as_partial(part.view(dtype), rows, value_dim)
                for part in (answer, device.mapped(answer))
            )
        jobs = None
        for kernel in kernels.kernels:
            if isinstance(kernel, NativeKernel):
                jobs = kernel.jobs(sent, on_host, scale=scale)
        return cls(sent, answer, on_host, on_device, jobs)


def tell_listeners(start_s: float, end_s: float) -> None:
    """Tell all listeners of one attention."""
    for listener in listeners:
        listener(start_s, end_s)


def _as_partial(memory: torch.Tensor, rows: torch.Size, value_dim: int) -> Partial:
    out, lse = memory.split((rows.numel() * value_dim, rows.numel()))
    return Partial(out.view(*rows, value_dim), lse.view(rows))


class _HostWork(Protocol):
    """A host function that attends, and notes when it did."""

    def __call__(self) -> None:
        """Attend; on any thread."""

    @property
    def finished(self) -> bool:
        """Whether it is done."""

    @property
    def times(self) -> tuple[float, float]:
        """When it began and ended, once it is done."""

    def release(self) -> None:
        """Let go of what was attended, once it is done."""


@dataclass(slots=True)
class _Time:
    """A time that host work took.

    Attributes:
        balance: who is told of it.
        seconds: None until it was taken in.
    """

    balance: Balance
    seconds: float | None = None


class _Call:
    """An attention by a kernel in Python.

    Args:
        attend: what to call, which must not raise.
    """

    def __init__(self, attend: Callable[[], None]) -> None:
        self._attend = attend
        self.finished = False
        self.times = 0.0, 0.0

    def __call__(self) -> None:
        start_s = time.perf_counter()
        self._attend()
        self.times = start_s, time.perf_counter()
        self.finished = True

    def release(self) -> None:
        """Do nothing: the caller drops it."""


class HostAttention:
    """A worker on the CPU that attends the newest stored tokens of one layer after another.

    All of it is one stream's work, in its order: fetch the query, attend. That orders the uses of
    the query's buffer from layer to layer. The query's event comes after the merge of the answer
    before, on compute, and so orders the uses of the answer's buffer.

    Args:
        device: what asks.
        stats: where bytes and seconds are counted.
        balances: told who finishes first.

    Attributes:
        pending: attentions that were asked for and not taken in yet, in order.
        failure: what one of them failed with and nobody heard of; None for nothing.
    """

    def __init__(self, device: Device, stats: Stats, balances: Balances) -> None:
        self._device = device
        self._stats = stats
        self._balances = balances
        self._exchanges: dict[tuple[object, ...], Exchange] = {}
        self.pending: collections.deque[tuple[_HostWork, _Time]] = collections.deque()
        self._asked: tuple[torch.Tensor, Exchange, Event | None, _Time] | None = None
        self._unjudged: collections.deque[tuple[Event, Event, _Time]] = collections.deque(
            maxlen=_UNJUDGED
        )
        self.failure: BaseException | None = None  # written by host work, taken by `check`
        self._taken = 0  # failures; what was asked before the newest of them is not attended

    def ask(
        self,
        geometry: Geometry,
        tiles: list[Tile],
        query: torch.Tensor,
        kernels: Kernels,
        scale: float,
    ) -> None:
        """Enqueue the attention of what is left to the host; before what shall run meanwhile.

        The memory of the tokens must stay until the host-work stream is settled.

        Args:
            geometry: of the layer, in host memory.
            tiles: tokens in host memory, of all heads.
            query: `[batch, kv_heads, group, q_len, key_dim]` on the device.
            kernels: of the CPU.
            scale: factor of the scores.
        """
        self._take_back()
        self._judge()
        compute, host_work = self._device.compute, self._device.host_work
        query = query.contiguous()
        compute.writes(query, "the query")
        exchange = self.exchange(query, geometry.value_dim, kernels, scale)
        balance = self._balances.at(query.shape[3])
        work, took = self._work(tiles, exchange, kernels, scale), _Time(balance)
        host_work.wait(compute.record(), Edge.QUERY_READY)
        # The query is kept until compute waits for the answer: only then may its memory be reused.
        # From now on, also where Ctrl-C comes before the end.
        self._asked = query, exchange, None, took
        host_work.copy(exchange.query, query)
        for tile in tiles:
            if tile.piece.ready is not None:
                host_work.wait(tile.piece.ready, Edge.TOKENS_SENT)
        if self._device.checks_accesses:
            self._state_accesses(exchange, tiles)
        self.pending.append((work, took))  # or nothing would keep what it works on
        host_work.run(work)
        self._asked = query, exchange, host_work.record(timed=not balance.fixed), took
        tokens = sum([tile.tokens for tile in tiles])
        self._stats.bytes_attended_on_host += geometry.num_bytes(tokens)

    def answer(self) -> Partial:
        """Hold compute until the host has answered, once all that may run before is enqueued.

        Returns:
            The partial result as the device reads it, valid on compute until the next `ask`.
        """
        assert self._asked is not None, "nothing was asked"
        _, exchange, answered, took = self._asked
        assert answered is not None
        if not took.balance.fixed:
            self._unjudged.append((self._device.compute.record(timed=True), answered, took))
        self._take_back()
        self._device.compute.reads(exchange.answer, "the host's partial result")
        return exchange.on_device

    def check(self) -> None:
        """Raise what the attention on the CPU failed with, if it did, and forget it.

        What was computed on the device since is worthless then. What is still pending is not
        looked at.
        """
        if self.pending:
            self._collect()
        failure = self.failure
        if failure is not None:  # or what is stored here might hide one that comes just now
            self._taken += 1
            self.failure = None
            raise failure

    def forget(self) -> None:
        """Forget what was asked; the host-work stream must be settled."""
        self._collect()
        self.pending.clear()
        self._asked = None
        self._unjudged.clear()

    def free(self) -> None:
        """Free the buffers; the host-work stream must be settled."""
        self.forget()
        if self._exchanges:
            self._device.synchronize()  # compute may not have read the last answer yet
        self._exchanges.clear()

    def _take_back(self) -> None:
        """Order compute after what was asked, also where a failure kept it from being answered."""
        if self._asked is not None:
            _, _, answered, _ = self._asked
            if answered is None:  # interrupted while it asked
                answered = self._device.host_work.record()
            self._device.compute.wait(answered, Edge.ANSWERED)
            self._asked = None

    def _judge(self) -> None:
        """Tell the balance of the answers whose order is known by now."""
        while self._unjudged:
            device_done, answered, took = self._unjudged[0]
            late_s = device_done.seconds_to(answered)
            if late_s is None:
                return
            if took.seconds is None:
                self._collect()
            self._unjudged.popleft()
            unasked = not self._unjudged  # also the newest one is done
            took.balance.note(late_s=late_s, host_s=took.seconds or 0.0, unasked=unasked)

    def _collect(self) -> None:
        """Take in the times of what ran since, and let go of what it attended."""
        while self.pending and self.pending[0][0].finished:
            work, took = self.pending.popleft()
            start_s, end_s = work.times
            took.seconds = end_s - start_s
            self._stats.host_attention_s += end_s - start_s
            tell_listeners(start_s, end_s)
            work.release()

    def exchange(
        self, query: torch.Tensor, value_dim: int, kernels: Kernels, scale: float
    ) -> Exchange:
        """Return the memory for queries of one shape, and for their answers."""
        key = (query.shape, query.dtype, value_dim, kernels, scale)
        exchange = self._exchanges.get(key)
        if exchange is None:
            exchange = Exchange.allocate(self._device, query, value_dim, kernels, scale)
            self._exchanges[key] = exchange
        return exchange

    def _work(
        self, tiles: list[Tile], exchange: Exchange, kernels: Kernels, scale: float
    ) -> _HostWork:
        """Return the attention of some tokens: a job where the kernel makes one."""
        if exchange.jobs is not None:
            job = exchange.jobs.make(tiles)
            if job is not None:
                return job
        work = Work(exchange.query, tiles, scale)
        answer = exchange.on_host
        return _Call(functools.partial(self._attend, kernels, work, answer, self._taken))

    def _state_accesses(self, exchange: Exchange, tiles: list[Tile]) -> None:
        host_work = self._device.host_work
        host_work.reads(exchange.query, "attention on the host")
        for tile in tiles:
            for part in (*tile.kv, *tile.piece.raw):
                host_work.reads(part, "attention on the host")
        host_work.writes(exchange.answer, "result of the host's attention")

    def _attend(self, kernels: Kernels, work: Work, answer: Partial, taken: int) -> None:
        """Attend some tokens on the CPU; runs as host work, so it keeps what it fails with.

        A call that has failed is over: nothing more of it is attended, nor fails once more.
        """
        if self.failure is not None or taken != self._taken:
            return
        try:
            with torch.no_grad():  # which each thread has a setting of its own for
                work.into = total = Accumulator()
                for part in unpacked_works(work, answer.out.shape[-1]):
                    kernels.pick(part).attend(part)
                partial = total.result()
                answer.out.copy_(partial.out)
                answer.lse.copy_(partial.lse)
        except BaseException as error:
            self.failure = error
