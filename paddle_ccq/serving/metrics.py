# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics under the names that FastDeploy exports, so that dashboards carry over.

Names and the absence of labels are those of FastDeploy's fastdeploy/metrics/metrics.py, the same at
c45e064f (2.4), 7648164f (2.5), 8c4f5a6a (2.6) and e53f5184. A label would break readers of plain
lines: FastDeploy's own router looks for the name followed by a space.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PREFIX = "fastdeploy:"
OWN_PREFIX = "paddle_ccq:"  # of what FastDeploy does not count
# Seconds, from an answer of a small model in a test to a long one of a large model.
TTFT = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
END_TO_END = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """What an engine reports; each server has its own registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(PREFIX + name, text, registry=registry)

        def counter(
            name: str, text: str, labels: tuple[str, ...] = (), prefix: str = PREFIX
        ) -> Counter:
            return Counter(prefix + name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=registry)

        self.running = gauge("num_requests_running", "Sequences being generated.")
        self.waiting = gauge("num_requests_waiting", "Sequences in the queue.")
        self.cache = gauge("gpu_cache_usage_perc", "Used part of the KV cache, 0 to 1.")
        self.requests = counter("requests_number", "Requests accepted.")
        self.prompt_tokens = counter(
            "prompt_tokens", "Prompt tokens of sequences that began to answer."
        )
        self.generated = counter("generation_tokens", "Tokens generated.")
        self.successes = counter("request_success", "Finished sequences.")
        self.first = histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT)
        self.between = histogram("time_per_output_token_seconds", "Between two tokens.", PER_TOKEN)
        self.whole = histogram("e2e_request_latency_seconds", "Arrival to last token.", END_TO_END)
        own = {"prefix": OWN_PREFIX}
        self.finished_by = counter(
            "sequences_finished", "Ended sequences by reason.", ("finished_reason",), **own
        )
        self.refused = counter("requests_refused", "Refused requests.", ("status",), **own)
        self.cancelled = counter("requests_cancelled", "Requests whose client left.", **own)

    def watch(self, counts: Callable[[], tuple[int, int, float]]) -> None:
        """Read the gauges from the engine whenever they are asked for."""
        for index, gauge in enumerate((self.running, self.waiting, self.cache)):
            gauge.set_function(lambda index=index: counts()[index])

    def prompt_done(self, tokens: int) -> None:
        self.prompt_tokens.inc(tokens)

    def first_token(self, seconds: float) -> None:
        self.generated.inc()
        self.first.observe(seconds)

    def token(self, seconds: float) -> None:
        self.generated.inc()
        self.between.observe(seconds)

    def finished(self, reason: str, seconds: float) -> None:
        self.finished_by.labels(reason).inc()
        if reason != "error":
            self.successes.inc()
            self.whole.observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format, for /metrics."""
        return generate_latest(self.registry)
