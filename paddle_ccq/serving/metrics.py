# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics under the names that FastDeploy exports, so that dashboards carry over.

FastDeploy's names are vLLM's with another prefix.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

PREFIX = "fastdeploy:"
# Seconds, from an answer of a small model in a test to a long one of a large model.
TTFT = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
END_TO_END = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """What an engine reports; each server has its own registry."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self.model = model

        def labelled(kind: type, name: str, text: str, more: tuple[str, ...] = (), **options):
            labels = ("model_name", *more)
            metric = kind(PREFIX + name, text, labels, registry=self.registry, **options)
            return metric if more else metric.labels(model)

        self.running = labelled(Gauge, "num_requests_running", "Sequences being generated.")
        self.waiting = labelled(Gauge, "num_requests_waiting", "Sequences in the queue.")
        self.cache = labelled(Gauge, "gpu_cache_usage_perc", "Used part of the KV cache, 0 to 1.")
        self.prompt_tokens = labelled(
            Counter, "prompt_tokens", "Prompt tokens of sequences that began to answer."
        )
        self.generated = labelled(Counter, "generation_tokens", "Tokens generated.")
        self.successes = labelled(
            Counter, "request_success", "Finished sequences.", ("finished_reason",)
        )
        self.failed = labelled(Counter, "request_failure", "Sequences ended by an error.")
        self.refused = labelled(
            Counter, "requests_refused", "Requests refused, by status.", ("status",)
        )
        self.cancelled = labelled(Counter, "requests_cancelled", "Requests whose client left.")
        self.first = labelled(
            Histogram, "time_to_first_token_seconds", "Arrival to first token.", buckets=TTFT
        )
        self.between = labelled(
            Histogram, "time_per_output_token_seconds", "Between two tokens.", buckets=PER_TOKEN
        )
        self.whole = labelled(
            Histogram, "e2e_request_latency_seconds", "Arrival to last token.", buckets=END_TO_END
        )

    def watch(self, counts: Callable[[], tuple[int, int, float]]) -> None:
        """Read the gauges from the engine whenever they are asked for."""
        for index, gauge in enumerate((self.running, self.waiting, self.cache)):
            gauge.set_function(lambda index=index: counts()[index])

    def prompt_done(self, tokens: int, seconds: float) -> None:
        self.prompt_tokens.inc(tokens)
        self.generated.inc()
        self.first.observe(seconds)

    def token(self, seconds: float) -> None:
        self.generated.inc()
        self.between.observe(seconds)

    def finished(self, reason: str, tokens: int, seconds: float) -> None:
        if reason == "error":
            self.failed.inc()
            return
        self.successes.labels(self.model, reason).inc()
        self.whole.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
