"""What Prometheus reads: the queue, seconds by phase, tokens, the cache, what was cancelled, batches."""

from collections.abc import Callable, Iterable
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from ..cache import ReferenceCache
from ..pipelines.engine import Generation

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
PICTURES = (1, 2, 3, 4, 6, 8, 12, 16)


class Metrics:
    """The figures of one server. Each has a registry of its own, so that several may live in a process."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        name = "sparse_context_"
        self.requests = Counter(
            f"{name}requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.waiting = Gauge(f"{name}queue_jobs", "Jobs that wait for their turn.", registry=registry)
        self.running = Gauge(f"{name}running_jobs", "Jobs that are being made.", registry=registry)
        self.uploads = Gauge(f"{name}uploads", "Requests whose body is being read.", registry=registry)
        self.refused = Counter(f"{name}refused", "Requests turned away because the queue was full.", registry=registry)
        self.queue_seconds = Histogram(
            f"{name}queue_seconds", "Seconds that a job waited.", buckets=SECONDS, registry=registry
        )
        self.phase_seconds = Histogram(
            f"{name}phase_seconds",
            "Seconds of a call of the pipeline, by phase; open is the decoding of the pictures that were sent.",
            ["phase"],
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter(
            f"{name}reference_tokens", "Reference tokens of the calls, by what became of them.", ["fate"],
            registry=registry,
        )  # fmt: skip
        self.cancelled = Counter(
            f"{name}cancelled_jobs", "Jobs that were stopped before they were done, by reason.", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.failed = Counter(f"{name}failed_jobs", "Jobs that ended in an error.", registry=registry)
        self.pictures = Counter(f"{name}pictures", "Pictures made.", registry=registry)
        self.joined = Counter(
            f"{name}joined_requests", "Requests answered by a job that was there: a client's retries.",
            registry=registry,
        )  # fmt: skip
        self.retried = Counter(
            f"{name}retried_calls", "Calls made again because their replica had died (Ray).", registry=registry
        )
        self.batch = Histogram(f"{name}batch_pictures", "Pictures of a call.", buckets=PICTURES, registry=registry)
        self.batch_jobs = Histogram(
            f"{name}batch_jobs", "Jobs that a call served together.", buckets=PICTURES, registry=registry
        )
        self.trial = Gauge(
            f"{name}batch_trial_seconds",
            "Seconds a picture in calls of so many, as tried at the start; the server takes the fastest.",
            ["pictures"],
            registry=registry,
        )
        ProcessCollector(registry=registry)

    def watch_cache(self, cache: ReferenceCache) -> None:
        """Have look-ups of this cache among the figures."""
        self._registry.register(_CacheCollector(lambda: {"hit": cache.hits, "miss": cache.misses}))

    def count_call(self, generations: list[Generation], jobs: int) -> None:
        """A call that made these pictures for so many jobs."""
        first = generations[0]
        for phase, seconds in asdict(first.times).items():
            self.phase_seconds.labels(phase).observe(seconds)
        if first.selection is not None:
            self.tokens.labels("kept").inc(first.selection.kept)
            self.tokens.labels("dropped").inc(max(0, first.selection.total - first.selection.kept))
        self.pictures.inc(len(generations))
        self.batch.observe(len(generations))
        self.batch_jobs.observe(jobs)

    def text(self) -> bytes:
        """All figures as Prometheus reads them."""
        return generate_latest(self._registry)


class _CacheCollector(Collector):
    def __init__(self, counts: Callable[[], dict[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterable[CounterMetricFamily]:
        family = CounterMetricFamily(
            "sparse_context_cache_lookups", "Look-ups of references in the cache, by result.", labels=["result"]
        )
        for result, count in self._counts().items():
            family.add_metric([result], count)
        yield family
