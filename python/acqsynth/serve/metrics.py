"""What a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SAMPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("acqsynth_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "acqsynth_request_seconds", "From a request's arrival to its answer", ["route"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.samples = Counter(
            "acqsynth_samples", "Samples that the model scored, and those refused before it", ["outcome"],
            registry=self.registry,
        )  # fmt: skip
        self.batch_samples = Histogram(
            "acqsynth_batch_samples", "Samples scored in one call", buckets=_SAMPLES, registry=self.registry
        )
        self.batch_tokens = Counter("acqsynth_batch_tokens", "Tokens scored", registry=self.registry)
        self.batch_seconds = Histogram(
            "acqsynth_batch_seconds", "Time of one scoring call", buckets=_SECONDS, registry=self.registry
        )
        self.reloads = Counter("acqsynth_reloads", "Loads of another student", ["outcome"], registry=self.registry)
        self.student_version = Gauge(
            "acqsynth_student_version", "1 for the student of the start, one more a reload", registry=self.registry
        )
        self._gauges: list[Gauge] = []

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        gauge = Gauge(name, text, registry=self.registry)
        gauge.set_function(value)
        self._gauges.append(gauge)

    def batch(self, samples: int, tokens: int, seconds: float) -> None:
        """One scoring call."""
        self.samples.labels("scored").inc(samples)
        self.batch_samples.observe(samples)
        self.batch_tokens.inc(tokens)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
