"""What Prometheus reads from /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)


class Metrics:
    """Counters of one application."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self.requests = Counter("mimco_requests", "Requests", ["method", "route", "status"], registry=registry)
        self.seconds = Histogram(
            "mimco_request_seconds", "From the first byte of a request to the last of its answer", ["route"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.in_flight = Gauge("mimco_requests_in_flight", "Requests being answered", registry=registry)
        self.steps = Histogram(
            "mimco_step_seconds", "Where a search spends its time: decode, wait, embed, search, rerank", ["step"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.queued = Gauge("mimco_pictures_admitted", "Pictures between admission and embedding", registry=registry)
        self.room = Gauge("mimco_pictures_room", "Most that are admitted", registry=registry)
        self.batches = Histogram("mimco_batch_pictures", "Pictures in a batch", buckets=_SIZES, registry=registry)
        self.thumbnails = Counter("mimco_thumbnails", "Thumbnails, from the cache or made", ["from"], registry=registry)
        self.generation = Gauge("mimco_index_generation", "Of the index that is searched", registry=registry)
        self.revision = Gauge("mimco_index_revision", "Of that generation; grows with each change", registry=registry)
        self.pictures = Gauge("mimco_index_files", "Files that a search can return", registry=registry)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
