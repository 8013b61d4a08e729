"""Prometheus metrics: what this process counts, and what the database tells of jobs and workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from shared.repository.tallies import BEYOND, BOUNDS, RUNNING, WAITING, Counted
from shared.tables import WorkerRow

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
        """The process's own metrics in Prometheus' text format."""
        return generate_latest(self._registry)


@dataclass(frozen=True)
class JobFigures:
    """An owner's jobs, or everybody's. The tallies are by label: a failure's code, or a bound of seconds."""

    by_status: Mapping[str, int]
    oldest_queued_seconds: float
    tokens_per_second: float
    failures: Mapping[str, Counted]
    waiting: Mapping[str, Counted]
    running: Mapping[str, Counted]


@dataclass(frozen=True)
class BoxFigures:
    """What only an admin sees. `queue_messages` is None while Redis is away."""

    queue_messages: int | None
    followers: int
    workers: Sequence[WorkerRow]


def render_figures(jobs: JobFigures, boxes: BoxFigures | None) -> bytes:
    """The figures in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(jobs, boxes))
    return generate_latest(registry)


class _Figures(Collector):
    def __init__(self, jobs: JobFigures, boxes: BoxFigures | None) -> None:
        self._jobs = jobs
        self._boxes = boxes

    def collect(self) -> Iterator[Metric]:
        yield from _of_jobs(self._jobs)
        if self._boxes is not None:
            yield from _of_boxes(self._boxes)


def _of_jobs(jobs: JobFigures) -> Iterator[Metric]:
    by_status = GaugeMetricFamily("tuneyard_jobs", "Jobs by status", labels=["status"])
    for status, count in sorted(jobs.by_status.items()):
        by_status.add_metric([status], count)
    yield by_status
    yield GaugeMetricFamily(
        "tuneyard_queue_oldest_seconds",
        "How long the longest waiting job has been queued, 0 without one",
        jobs.oldest_queued_seconds,
    )
    yield GaugeMetricFamily(
        "tuneyard_tokens_per_second", "Tokens a second of the running jobs together", jobs.tokens_per_second
    )
    failures = CounterMetricFamily("tuneyard_job_failures", "Jobs that failed, by code", labels=["code"])
    for code, counted in sorted(jobs.failures.items()):
        failures.add_metric([code], counted.times)
    yield failures
    yield _histogram(
        "tuneyard_job_waiting_seconds", "Seconds from a job's post to its first start", WAITING, jobs.waiting
    )
    yield _histogram(
        "tuneyard_job_running_seconds", "Seconds that ended jobs ran in all", RUNNING, jobs.running
    )


def _histogram(name: str, text: str, tally: str, found: Mapping[str, Counted]) -> Metric:
    buckets, reached = [], 0
    for bound in (*map(str, BOUNDS[tally]), BEYOND):
        reached += found[bound].times if bound in found else 0
        buckets.append((bound, float(reached)))
    family = HistogramMetricFamily(name, text)
    family.add_metric([], buckets, sum(counted.total for counted in found.values()))
    return family


def _of_boxes(boxes: BoxFigures) -> Iterator[Metric]:
    if boxes.queue_messages is not None:
        yield GaugeMetricFamily(
            "tuneyard_queue_messages", "Doorbell messages that wait", boxes.queue_messages
        )
    yield GaugeMetricFamily("tuneyard_log_followers", "Clients that follow a log", boxes.followers)
    yield GaugeMetricFamily("tuneyard_workers", "Workers on line", len(boxes.workers))
    labels = ["host", "gpu", "name"]
    total = GaugeMetricFamily("tuneyard_gpu_memory_bytes", "Memory of a GPU", labels=labels)
    used = GaugeMetricFamily(
        "tuneyard_gpu_memory_used_bytes", "Memory in use on a GPU, by whomever", labels=labels
    )
    busy = GaugeMetricFamily(
        "tuneyard_gpu_utilization_ratio", "Share of time in which a GPU computes", labels=labels
    )
    for worker in boxes.workers:
        for gpu in worker.gpus:
            of = [worker.hostname, str(gpu["index"]), gpu["name"]]
            for family, name in ((total, "memory_bytes"), (used, "used_bytes"), (busy, "utilization")):
                if gpu[name] is not None:
                    family.add_metric(of, gpu[name])
    yield from (total, used, busy)
