"""Prometheus metrics. What the store knows is asked at the scrape, also which jobs have ended since the last one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from .store import Store


class Metrics(Collector):
    """The metrics of one server."""

    def __init__(self, store: Store) -> None:
        self._store, self._seen = store, time.time()
        self._lock = threading.Lock()
        registry = self.registry = CollectorRegistry()
        self.rejected = Counter("stylize_rejected", "Requests refused, by status", ["status"], registry=registry)
        self.accepted = Counter("stylize_jobs_accepted", "Jobs accepted", registry=registry)
        self._finished = Counter("stylize_jobs_finished", "Jobs that ended, by state", ["state"], registry=registry)
        seconds = (0.5, 1, 2, 5, 10, 20, 60, 120, 300, 900, 3600)
        self._seconds = Histogram("stylize_job_seconds", "Running time of a job", buckets=seconds, registry=registry)
        self._waited = Histogram(
            "stylize_job_wait_seconds", "Time from acceptance to the start", buckets=seconds, registry=registry
        )
        iteration = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
        self._iteration = Histogram(
            "stylize_iteration_seconds", "Mean time of a job's iterations", buckets=iteration, registry=registry
        )
        registry.register(self)

    def text(self) -> bytes:
        """The exposition, up to date."""
        with self._lock:  # two scrapes at once would count a job twice
            for row in self._store.finished_since(self._seen):
                self._seen = row["finished"]
                self._finished.labels(row["state"]).inc()
                if row["started"] is not None:
                    self._waited.observe(max(0.0, row["started"] - row["created"]))  # a clock may be set back
                    self._seconds.observe(row["seconds"])
                if row["iteration"]:
                    self._iteration.observe(row["seconds"] / row["iteration"])
        return generate_latest(self.registry)

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry need not ask the store before the first scrape."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Gauges of what the store holds now."""
        counts = self._store.counts()
        yield GaugeMetricFamily("stylize_queue_depth", "Jobs that wait", value=counts.get("queued", 0))
        yield GaugeMetricFamily("stylize_in_flight", "Jobs that run", value=counts.get("running", 0))
        workers = GaugeMetricFamily("stylize_workers", "Workers that are ready", labels=["device", "weights"])
        found: dict[tuple[str, str], int] = {}
        for row in self._store.workers():
            key = row["device"], row["weights"]
            found[key] = found.get(key, 0) + 1
        for labels, number in found.items():
            workers.add_metric(labels, number)
        yield workers
