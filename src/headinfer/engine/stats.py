"""What an attachment measured while it ran."""

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Stats:
    """A set of totals since the attachment, over all its caches.

    Attributes:
        prefill_tokens: tokens that passed through the model several at a time, all rows together.
        prefill_s: seconds spent on them.
        device_prefill_s: of those, the seconds in which each of several devices worked; empty for
            one device, or where a device does not tell.
        decode_tokens: tokens that passed one position at a time, or as drafts that were not taken
            back, all rows together.
        decode_s: seconds of the model calls spent on them and of drafting, captures left out.
        decode_steps: those model calls.
        captured_steps: those of them that were replayed, in one launch or in pieces.
        captured_verifications: those of them that had several new tokens, as to verify drafts.
        captures: decode steps that were captured to be replayed.
        capture_s: seconds that took, with what torch compiled for it; beside `decode_s`.
        draft_steps: model calls in which a token was drafted.
        captured_drafts: those of them that were replayed.
        draft_s: seconds of drafting, by these calls or otherwise, captures left out. Those of an
            answer's drafts are part of `decode_s`.
        draft_read_s: seconds in which assistants read prompts; beside all other times.
        verifications: decode steps that verified drafts.
        verify_s: seconds of them, a part of `decode_s`.
        drafted_tokens: drafts that they verified.
        accepted_tokens: drafts that were right; each verification gives one token more.
        bytes_to_device: KV bytes copied over the link to the device.
        bytes_to_host: KV bytes copied back.
        bytes_to_disk: KV bytes written to the disk below host memory.
        bytes_from_disk: KV bytes read from there.
        bytes_attended_on_host: KV bytes attended by the CPU on behalf of a device.
        host_attention_s: seconds that took.
        peak_device_kv_bytes: the most device memory the arenas held at once, by allocation.
        host_kv_bytes: the most host memory the stores held at once.
        standard_kv_bytes: what standard inference would have held on the device for the same
            tokens, at the most.
    """

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    device_prefill_s: tuple[float, ...] = ()
    decode_tokens: int = 0
    decode_s: float = 0.0
    decode_steps: int = 0
    captured_steps: int = 0
    captured_verifications: int = 0
    captures: int = 0
    capture_s: float = 0.0
    draft_steps: int = 0
    captured_drafts: int = 0
    draft_s: float = 0.0
    draft_read_s: float = 0.0
    verifications: int = 0
    verify_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    bytes_to_disk: int = 0
    bytes_from_disk: int = 0
    bytes_attended_on_host: int = 0
    host_attention_s: float = 0.0
    peak_device_kv_bytes: int = 0
    host_kv_bytes: int = 0
    standard_kv_bytes: int = 0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prefill speed; 0 before any."""
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Decode speed without captures; 0 before any."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0

    @property
    def accepted_per_verify(self) -> float:
        """Drafts accepted by a verification on average; 0 before any."""
        return self.accepted_tokens / self.verifications if self.verifications else 0.0

    @property
    def device_busy(self) -> tuple[float, ...]:
        """Share of the prefill in which each of several devices worked; empty for one."""
        return tuple(seconds / self.prefill_s for seconds in self.device_prefill_s)

    def add_prefill(self, tokens: int, seconds: float, device_s: tuple[float, ...]) -> None:
        """Count tokens of a prompt.

        Args:
            tokens: of all rows together.
            seconds: that they took.
            device_s: seconds of each of several devices.
        """
        before = self.device_prefill_s or (0.0,) * len(device_s)
        self.prefill_tokens += tokens
        self.prefill_s += seconds
        if device_s:
            self.device_prefill_s = tuple(map(sum, zip(before, device_s, strict=True)))

    def raise_peaks(self, device_bytes: int, host_bytes: int, standard_bytes: int) -> None:
        """Note what is held now, for the most of each: on the device, the host, and by standard."""
        self.peak_device_kv_bytes = max(self.peak_device_kv_bytes, device_bytes)
        self.host_kv_bytes = max(self.host_kv_bytes, host_bytes)
        self.standard_kv_bytes = max(self.standard_kv_bytes, standard_bytes)
