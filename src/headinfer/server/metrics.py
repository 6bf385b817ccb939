"""What a server counts, for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from headinfer.server.problems import ProblemError
from headinfer.server.served import Phase, Service
from headinfer.serving.events import Ended

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


class _Slots(Collector):
    """A collector of what the desk holds at the moment of asking."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[GaugeMetricFamily]:
        """Name nothing before it is asked for."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the requests by what they do, and the bytes of KV by where they are."""
        try:
            slots = self._service.served.desk.slots()
        except ProblemError:
            return
        states = GaugeMetricFamily(
            "headinfer_slots", "Requests and kept prefixes by what they do.", labels=["state"]
        )
        held = GaugeMetricFamily(
            "headinfer_kv_bytes", "Bytes of the KV cache by where they are.", labels=["place"]
        )
        for state in sorted({"running", "waiting", "kept"} | {slot.state for slot in slots}):
            states.add_metric([state], sum(slot.state == state for slot in slots))
        held.add_metric(["gpu"], sum(slot.device_bytes for slot in slots))
        held.add_metric(["cpu"], sum(slot.host_bytes for slot in slots))
        held.add_metric(["disk"], sum(slot.disk_bytes for slot in slots))
        yield states
        yield held


class Metrics:
    """A server's metrics, in a registry of their own.

    Args:
        service: that is counted.
    """

    def __init__(self, service: Service) -> None:
        self._registry = registry = CollectorRegistry()
        ready = Gauge("headinfer_ready", "Whether requests are taken.", registry=registry)
        ready.set_function(lambda: service.phase is Phase.READY)
        self._answers = Counter(
            "headinfer_http_responses",
            "Answers of HTTP by path and status.",
            ["method", "path", "status"],
            registry=registry,
        )
        self._ends = Counter(
            "headinfer_requests", "Requests by how they ended.", ["reason"], registry=registry
        )
        self._tokens = Counter(
            "headinfer_tokens",
            "Tokens of prompts that were read, had from a kept prefix, or generated.",
            ["kind"],
            registry=registry,
        )
        self._prefill = Histogram(
            "headinfer_prefill_seconds",
            "Seconds that a prompt took.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._decode = Counter(
            "headinfer_decode_seconds", "Seconds that all decoding took.", registry=registry
        )
        ProcessCollector(registry=registry, namespace="headinfer")
        registry.register(_Slots(service))

    def answered(self, method: str, path: str, status: int, known: bool) -> None:
        """Count an answer.

        Args:
            method: of the request.
            path: of the request.
            status: of the answer; 0 where the client went away before it.
            known: whether the path is one of ours; others are counted as one.
        """
        told = path if known else "other"
        self._answers.labels(method if known else "other", told, status or "none").inc()

    def ended(self, ended: Ended) -> None:
        """Count a request that ended."""
        usage = ended.usage
        self._ends.labels(ended.finish_reason).inc()
        self._tokens.labels("read").inc(max(usage.prompt_tokens - usage.cached_tokens, 0))
        self._tokens.labels("cached").inc(usage.cached_tokens)
        self._tokens.labels("generated").inc(usage.completion_tokens)
        if usage.completion_tokens:
            self._prefill.observe(usage.prefill_s)
        self._decode.inc(usage.decode_s)

    def text(self) -> bytes:
        """Return all of them in Prometheus's text format."""
        return generate_latest(self._registry)
