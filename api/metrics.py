"""Prometheus metrics: a registry per application, and what a caller may see of it."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from starlette.types import Scope

METHODS = frozenset({"GET", "HEAD", "POST", "DELETE", "OPTIONS"})
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Request latencies, by method, route template and status."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._latency = Histogram(
            "tuneyard_http_request_seconds",
            "Seconds from a request to the first byte of its answer",
            ["method", "route", "status"],
            registry=self._registry,
            buckets=BUCKETS,
        )

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        # Templates and known methods only: a client must not be able to make new time series.
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = getattr(scope.get("route"), "path", "unmatched")
        self._latency.labels(method, route, str(status)).observe(seconds)

    def render(self) -> bytes:
        """The service's own metrics in Prometheus' text format."""
        return generate_latest(self._registry)


def render_jobs(counts: Mapping[str, int], queue_depth: int | None, followers: int | None) -> bytes:
    """Jobs by status and, where given, the doorbell queue's depth and the log's followers."""
    registry = CollectorRegistry()
    jobs = Gauge("tuneyard_jobs", "Jobs by status", ["status"], registry=registry)
    for status, count in sorted(counts.items()):
        jobs.labels(status).set(count)
    if queue_depth is not None:
        Gauge("tuneyard_queue_messages", "Doorbell messages that wait", registry=registry).set(queue_depth)
    if followers is not None:
        Gauge("tuneyard_log_followers", "Clients that follow a log", registry=registry).set(followers)
    return generate_latest(registry)
