"""The protocol between the engine and a device: memory, four streams, and the waits between them.

Every ordering the engine relies on is one `Edge`. A stream runs its work in order; work on two
streams is ordered only where one waits for an event the other recorded.
"""

import contextlib
import enum
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from headinfer.device.host_ahead import HostMemory


class Edge(enum.Enum):
    """Every wait between streams: what was produced where, and who must not start before it."""

    MEMORY_FREE = "compute is done with what lay in new memory before; copy-in overwrites it"
    TILE_FILLED = "copy-in filled a staging buffer; compute reads it"
    TILE_FREE = "compute has read a staging buffer; copy-in overwrites it"
    PAGE_WRITTEN = "compute wrote keys and values into a page or the residents; copy-out reads them"
    PAGE_FREE = "copy-out has read a page; compute overwrites it"
    HOST_WRITTEN = "copy-out wrote tokens into the host store; copy-in reads them"
    PAGES_SENT = "copy-out wrote packed pages into the host store; compute reads them there"
    PAGES_READ = "others have read packed pages of the host store; copy-out overwrites them"
    QUERY_READY = "compute wrote a query, and merged the last answer; host work fetches and answers"
    TOKENS_SENT = "copy-out wrote tokens into the host store; host work attends them"
    ANSWERED = "host work wrote its partial result; compute merges it from where it is"
    DRAFT_FREE = "compute has read copies that drafts attend; copy-in overwrites them"
    DRAFT_FILLED = "copy-in copied tokens for drafts; compute attends them"
    STEP_READY = "other streams did what a captured step finds done; compute begins the step"
    STEP_DONE = "copy-in fetched a captured step's first tiles once more; compute ends the step"
    SERVED = "a server answered by a flag; host work goes on"
    STEP_JOINED = "compute of another device came so far; compute of the one that launches goes on"
    STEP_FORKED = "compute of the device that launches came so far; compute of another goes on"
    BLOCK_SENT = "copy-out wrote a block into the host store; the host writes it to the disk"
    BLOCK_READ = "others have read a block that is on the disk now; copy-out overwrites its memory"
    READ_COPIED = "copy-in has read tokens that came from the disk; the host reads others there"
    HOST_SETTLED = "work on host memory or the arena is done; the host reads, moves or frees it"


_Result = TypeVar("_Result")
_Captured = TypeVar("_Captured", covariant=True)


class CaptureError(Exception):
    """An error of work that cannot be captured; its message is a clause that says why."""


class PlaceError(CaptureError):
    """An error of attention that cannot be captured, though all else may be."""


class Capture(Protocol[_Captured]):
    """A recording of compute's work that runs in few launches, mostly one, again and again.

    It reads and writes the memory that was there when it was captured. Whoever replays it keeps
    that memory.
    """

    def replay(self) -> _Captured:
        """Enqueue the work on compute, and return the result, valid there until the next replay.

        Captures of one device share memory: a replay of any of them may overwrite the result.
        """


class Event(Protocol):
    """A point in a stream's work."""

    @property
    def reached(self) -> bool:
        """Whether all work before it is done; orders nothing."""

    def synchronize(self, edge: Edge) -> None:
        """Block the host until the point is reached."""

    def seconds_to(self, other: "Event") -> float | None:
        """Seconds from when this was reached to when `other` was; less than 0 if that was first.

        None until both are. Orders nothing. Both were recorded as `timed`, on whichever streams.
        """


class Mark(Protocol):
    """A point in the compute stream's work, which only the host looks at."""

    @property
    def reached(self) -> bool:
        """Whether all work before it is done."""

    def wait(self) -> None:
        """Block the host until it is reached."""


class Server(Protocol):
    """A thread of the host's that does a task for each flag that a stream raises, in their order.

    Where the flag `asks[i]` is up, it lowers it, does `tasks[i]`, and raises `answers[i]`. It goes
    round all flags, and looks at the next one alone.

    Attributes:
        asks: flags `[tasks]` of int64, in host memory.
        answers: flags as many.
    """

    asks: torch.Tensor
    answers: torch.Tensor

    @property
    def tasks(self) -> "Sequence[ServedTask | None]":
        """What is done; replaced only while nothing is asked."""

    def begin(self) -> None:
        """Begin the thread, if there is none yet.

        Raises:
            PlaceError: the system grants none.
        """


class ServedTask(Protocol):
    """A task of a server's."""

    def __call__(self) -> None:
        """Do it."""

    def state_accesses(self, stream: "Stream") -> None:
        """State what the task reads and writes, as work of a stream."""


class Stream(Protocol):
    """A queue of work, run in order: on the device, or beside it on the host."""

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Enqueue a copy between tensors of equal shape and dtype, and return.

        A tile, whose heads lie apart, takes one transfer for each head, or one for all where the
        device copies strips.
        """

    def copy_tokens(
        self,
        destination: Sequence[torch.Tensor],
        at: int,
        source: Sequence[torch.Tensor],
        first: int,
        tokens: int,
    ) -> None:
        """Enqueue copies of `tokens` tokens from `first` on of each source, to `at`; see `copy`.

        Tensors are contiguous, `[batch, heads, tokens, dim]`. Each is copied to the one that has
        its place in `destination`, alike but for the number of tokens.
        """

    def run(self, function: Callable[[], None]) -> None:
        """Enqueue a call of a function of the host, and return.

        It runs in the stream's order, on another thread than the caller's. It must not raise, nor
        use a device, nor wait for anything that does; nor hold the last reference to memory that
        the device knows. A `NativeFunction` is called without Python; its caller keeps it until it
        ran.
        """

    def record(self, *, timed: bool = False) -> Event:
        """Return an event that is reached when all work enqueued so far is done.

        Args:
            timed: whether `seconds_to` will be asked.
        """

    def wait(self, event: Event, edge: Edge) -> None:
        """Hold all work enqueued from now on until `event` is reached; the host goes on."""

    def raise_flag(self, flag: torch.Tensor) -> None:
        """Enqueue the raising of a flag, `[1]` of int64 in mapped host memory.

        Raises:
            PlaceError: the device knows no flags.
        """

    def lower_flag(self, flag: torch.Tensor) -> None:
        """Enqueue the lowering of a flag; see `raise_flag`."""

    def await_flag(self, flag: torch.Tensor, edge: Edge) -> None:
        """Hold all work enqueued from now on until a flag is up; see `raise_flag`.

        One that is still up from before holds nothing.
        """

    def reads(self, tensor: torch.Tensor, purpose: str) -> None:
        """State that work now enqueued by other means reads `tensor`; only checked, never done."""

    def writes(self, tensor: torch.Tensor, purpose: str) -> None:
        """State that work now enqueued by other means writes `tensor`."""


class Device(Protocol):
    """A device: where attention is computed, with the memory and streams around it.

    Where `tiles_are_views`, tiles are views of the store and no stream is ever used.
    """

    @property
    def name(self) -> str:
        """The kind of device."""

    @property
    def torch_device(self) -> torch.device:
        """Where attention reads tensors."""

    def in_use(self) -> contextlib.AbstractContextManager[None]:
        """Have it be the current device of this thread in the `with` statement.

        It matters only where there are several: a default stream is the current device's.
        """

    @property
    def tiles_are_views(self) -> bool:
        """Whether host memory is device memory."""

    @property
    def packs_fast(self) -> bool:
        """Whether it packs and unpacks tokens in less time than their link is spared by that."""

    @property
    def checks_accesses(self) -> bool:
        """Whether anything is done with accesses that are stated, so that they should be."""

    @property
    def compute(self) -> Stream:
        """The model's stream."""

    @property
    def copy_in(self) -> Stream:
        """The stream of host-to-device copies."""

    @property
    def copy_out(self) -> Stream:
        """The stream of device-to-host copies."""

    @property
    def host_work(self) -> Stream:
        """The stream of what the host computes for the device, and of the copies around that."""

    def host_empty(self, num_bytes: int) -> torch.Tensor:
        """Return `num_bytes` of uninitialised host memory as uint8, ready for asynchronous copies.

        The caller owns it; it is freed with its last view, which must not be before every copy
        that touches it is done.
        """

    @property
    def host_piece_bytes(self) -> int | None:
        """Host memory to be got at a time, ahead of need; None where getting it takes no time."""

    def host_ahead(self, num_bytes: int) -> HostMemory:
        """Have host memory got in the background, in the order of asking; see `host_empty`."""

    @property
    def spare_host_bytes(self) -> int:
        """Host memory that is kept for the next caches, and that can be had at once."""

    def keep_host_memory(self, spare_bytes: int, most_bytes: int | None) -> None:
        """Keep so much host memory of gone caches: with what is used, up to any `most_bytes`."""

    def device_empty(self, num_bytes: int) -> torch.Tensor:
        """Return `num_bytes` of uninitialised device memory as uint8.

        Compute may still use what lay there before; other streams wait for what compute has
        enqueued by now. The memory is freed with its last view, and is then compute's at once. It
        must not be freed before compute or the host has waited for every copy that touches it.
        """

    def give_back_unused(self) -> None:
        """Give back device memory that was freed, and is kept for whoever asks next."""

    def mapped(self, memory: torch.Tensor) -> torch.Tensor:
        """Return memory of `host_empty` as a tensor that the device's kernels read where it lies.

        For what is small and awaited: a copy to the device would queue behind all tiles on their
        way, whichever stream it is on. The view keeps the memory.
        """

    def host_access(self, tensor: torch.Tensor, *, write: bool, purpose: str) -> None:
        """State that the host now reads or writes `tensor` itself; only checked, never done."""

    @property
    def captures(self) -> bool:
        """Whether work on compute can be captured."""

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """Have compute be the stream that `capture` uses, in order with the caller's work.

        What runs there first prepares what a capture must find prepared: workspaces and programs.
        """

    def capture(self, work: Callable[[], _Result], *beside: "Device") -> Capture[_Result]:
        """Record what a function enqueues on compute, without running it.

        Another stream takes part from when it waits for an event that the function recorded on
        compute. In the end compute must have waited for all its work. No event from before may be
        waited for.

        Args:
            work: called once, now. It must wait for nothing and read nothing back but through
                `launch`. Memory that it takes belongs to the capture.
            *beside: other devices of this kind, whose compute takes part as if it were this one's.

        Raises:
            CaptureError: the device cannot, or the work is none that can be captured.
        """

    def launch(self, work: Callable[[], None]) -> None:
        """Run what enqueues kernels on compute that read from memory what differs in each replay.

        Args:
            work: called now; a device that only simulates calls it at each replay, too.
        """

    def aside(self, work: Callable[[], None]) -> None:
        """Have a function called between what is captured before it and after, at each replay.

        So a capture is in several launches. Outside of a capture it is called now.

        Args:
            work: enqueues on compute what cannot be captured, on memory that the capture keeps. It
                is not called during the capture.
        """

    def serve(self, server: Server) -> None:
        """Have a server do what the device's streams ask by its flags.

        Raises:
            PlaceError: there can be none.
        """

    def free_bytes(self) -> int | None:
        """Return the device memory that can still be had; None where nothing limits it."""

    def mark_compute(self) -> Mark:
        """Return a mark behind the compute stream's work so far."""

    def finish_compute(self) -> None:
        """Block the host until the compute stream is done; copies may go on."""

    def synchronize(self) -> None:
        """Block the host until all work on the device is done."""
