"""What a trial reports back to the process that started it. Pure Python, never torch."""

import enum
from dataclasses import asdict, dataclass
from typing import Any

from headinfer.bench.held import DENSE, HeldPart


class Status(enum.Enum):
    """How a trial, or a row made of trials, ended."""

    OK = "ok"
    """Measured, and equal to the reference."""

    MISMATCH = "mismatch"
    """The result differs from the reference: not to be used."""

    UNCHECKED = "unchecked"
    """Measured, but the reference could not run: nothing to compare with."""

    CANNOT_RUN = "cannot_run"
    """Refused, out of memory, or without the hardware or library it needs."""

    FAILED = "failed"
    """Ended by an error that is nobody's limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialFailure:
    """A reason why a trial has no result.

    Attributes:
        status: `CANNOT_RUN` or `FAILED`.
        reason: one line for people.
        grows: whether a longer context would end the same way: it lacks memory or time.
        ends_run: whether every other trial would end the same way: the model cannot be loaded.
    """

    status: Status
    reason: str
    grows: bool = False
    ends_run: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """A record of what one trial measured.

    Attributes:
        device: kind of device the model was on: "cpu" or "cuda".
        note: what a reader of the numbers must know; empty for nothing.
        prefill_s: seconds of the prefill; None where not all of the prompt passed the model.
        first_prefill_s: of the same prompt before that, the first of the process; None where that
            was not timed.
        decode_s: seconds of each decode step.
        greedy_tokens: the likeliest token after the prompt and after each decode step.
        logits: the logits they come from, for the first few of them: rows of float32 in base64.
        peak_rss_growth_bytes: peak resident memory over what the loaded, warmed-up model takes.
        rss_source: how the peak was found.
        kv_host_bytes: KV bytes held in host memory at the end.
        kv_device_bytes: KV bytes held on the device at the end; 0 where there is no device memory.
        streamed_kv_bytes: KV bytes that a decode step needs over the link.
        host_attended_kv_bytes: KV bytes that the CPU attends on behalf of a device.
        unseen_kv_bytes: KV bytes of the context that no query of a decode step sees.
        format: the form of KV in host memory.
        raw_page_bytes: room in host memory for pages that do not pack, in `kv_host_bytes`.
        others_cpu_share: share of the CPU that other programs used meanwhile.
        planned_activation_bytes: what the method planned for activations; None if it plans none.
        plan: sizes the method chose; None if it chooses none.
        prefill_bytes_to_device: bytes copied over the link to the device during prefill.
        prefill_bytes_to_host: bytes copied back.
        decode_bytes_to_device: bytes copied to the device during the decode steps.
        decode_bytes_to_host: bytes copied back.
        device_peak_allocated_bytes: the most torch had allocated on the device; None without one.
        device_peak_reserved_bytes: the most torch had reserved there.
        accepted_per_verify: drafts that a verification accepted, on average; None without drafts.
        draft_s: seconds of the drafts of one verification, the median.
        verify_s: seconds of a verifying pass, the median.
        parts: what each GPU has to do with the KV, where the model is spread over several.
        kv_disk_bytes: KV bytes on a disk below host memory at the end.
        disk_read_bytes: KV bytes that a decode step reads from it.
        disk_read_bytes_per_s: the rate of its disk right behind the steps; 0 where there is none.
        host_shared_bytes_per_s: the rate at which CPU and links read host memory at once, behind
            the steps as well; 0 where the CPU attended nothing of them.
    """

    device: str
    prefill_s: float | None
    decode_s: tuple[float, ...]
    greedy_tokens: tuple[int, ...]
    logits: tuple[str, ...]
    peak_rss_growth_bytes: int
    rss_source: str
    kv_host_bytes: int
    kv_device_bytes: int
    note: str = ""
    first_prefill_s: float | None = None
    streamed_kv_bytes: int = 0
    host_attended_kv_bytes: int = 0
    unseen_kv_bytes: int = 0
    format: str = DENSE
    others_cpu_share: float = 0.0
    planned_activation_bytes: int | None = None
    plan: dict[str, int] | None = None
    prefill_bytes_to_device: int = 0
    prefill_bytes_to_host: int = 0
    decode_bytes_to_device: int = 0
    decode_bytes_to_host: int = 0
    device_peak_allocated_bytes: int | None = None
    device_peak_reserved_bytes: int | None = None
    accepted_per_verify: float | None = None
    draft_s: float | None = None
    verify_s: float | None = None
    raw_page_bytes: int = 0
    parts: tuple[HeldPart, ...] = ()
    kv_disk_bytes: int = 0
    disk_read_bytes: int = 0
    disk_read_bytes_per_s: float = 0.0
    host_shared_bytes_per_s: float = 0.0


def to_json(outcome: TrialResult | TrialFailure) -> dict[str, Any]:
    """Return a trial's outcome as JSON values."""
    if isinstance(outcome, TrialFailure):
        return asdict(outcome) | {"status": outcome.status.value}
    return {"status": Status.OK.value} | asdict(outcome)


def from_json(values: dict[str, Any]) -> TrialResult | TrialFailure:
    """Return the outcome that `to_json` gave."""
    values = dict(values)
    status = Status(values.pop("status"))
    if status is not Status.OK:
        return TrialFailure(status=status, **values)
    for name in ("decode_s", "greedy_tokens", "logits"):
        values[name] = tuple(values[name])
    values["parts"] = tuple(HeldPart(**part) for part in values["parts"])
    return TrialResult(**values)
