"""What `/metrics` shows, in the text format of Prometheus."""

import prometheus_client as prometheus

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters of one server. All methods of its parts can be called from any thread."""

    def __init__(self) -> None:
        self._registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        self.requests = prometheus.Counter(
            "s2s_serve_requests",
            "Requests by route and status",
            ["route", "status"],
            registry=registry,
        )
        self.request_seconds = prometheus.Histogram(
            "s2s_serve_request_seconds",
            "Time from the head of a request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.model_seconds = prometheus.Histogram(
            "s2s_serve_model_seconds",
            "Time of a call of the model",
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_histories = prometheus.Histogram(
            "s2s_serve_batch_histories",
            "Histories of a call of the model",
            buckets=_SIZES,
            registry=registry,
        )
        self.batch_requests = prometheus.Histogram(
            "s2s_serve_batch_requests",
            "Requests joined into a call of the model",
            buckets=_SIZES,
            registry=registry,
        )
        self.waiting = prometheus.Gauge(
            "s2s_serve_waiting_requests", "Requests that wait for the model", registry=registry
        )
        self.answers = prometheus.Counter(
            "s2s_serve_answers",
            "Answered histories by what ranked the items",
            ["by"],
            registry=registry,
        )
        self.unknown = prometheus.Counter(
            "s2s_serve_unknown_events", "Events that the model has never seen", registry=registry
        )
        self.version = prometheus.Gauge(
            "s2s_serve_model_version", "Version that answers", registry=registry
        )
        self.reloads = prometheus.Counter(
            "s2s_serve_reloads", "Loads of a version by result", ["result"], registry=registry
        )
        for result in ("loaded", "failed"):
            self.reloads.labels(result)

    def text(self) -> bytes:
        """All metrics."""
        return prometheus.generate_latest(self._registry)


# The Content-Type of `Metrics.text`.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
