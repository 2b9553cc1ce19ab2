"""Counts for Prometheus. Owns prometheus_client."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from open_gem.serve.cache import Cache

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
INPUTS = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The metrics of one application, in a registry of its own."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "open_gem_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self._seconds = Histogram(
            "open_gem_request_seconds", "From a request's first byte to its answer.", ("route",),
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self._pending = Gauge("open_gem_pending_requests", "Requests waiting or worked on.", registry=self.registry)
        self._bodies = Gauge("open_gem_body_bytes", "Bytes of their bodies.", registry=self.registry)
        self._batches = Histogram(
            "open_gem_batch_inputs", "Inputs of a batch: images to encode, requests to locate.", ("work",),
            buckets=INPUTS, registry=self.registry,
        )  # fmt: skip
        self._images = Gauge("open_gem_cache_images", "Images in the cache.", registry=self.registry)
        self._bytes = Gauge("open_gem_cache_bytes", "Bytes of the cache.", registry=self.registry)
        self._lookups = Counter(
            "open_gem_cache_lookups", "Images looked up in the cache.", ("hit",), registry=self.registry
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def pending(self, requests: int, body_bytes: int) -> None:
        self._pending.set(requests)
        self._bodies.set(body_bytes)

    def saw_batch(self, work: str, inputs: int) -> None:
        self._batches.labels(work).observe(inputs)

    def holds(self, cache: Cache) -> None:
        self._images.set(len(cache))
        self._bytes.set(cache.nbytes)

    def looked_up(self, *, hit: bool) -> None:
        self._lookups.labels(str(hit).lower()).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
