"""HTTP metrics by route, under the names of prometheus-fastapi-instrumentator.

Dashboards for web servers know these names. Every label has few values: a route is labelled by the
template of its path, and an unknown path or method never becomes a time series of its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from aiohttp import web
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pyserve.histogram import HTTP_BUCKETS_S, HTTP_FINE_BUCKETS_S, Histogram

METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
# Monitoring polls these routes all day, which would hide other requests. vLLM excludes them too.
NOT_COUNTED = frozenset({
    "/health", "/health/live", "/health/ready", "/load", "/metrics", "/ping", "/version",
})  # fmt: skip
NO_ROUTE = "none"  # the label of requests for unknown paths
GONE = 499  # nginx's status for a client that left before its response began
STATUS = web.RequestKey("status", int)  # status of the response, once it has begun


class HttpMetrics(Collector):
    """Counts requests, and times them from their headers to the last byte of their response."""

    def __init__(self, root_path: str) -> None:
        self._root_path = root_path
        self._num_requests: Counter[tuple[str, str, str]] = Counter()  # by handler, method, status
        self._duration_s: dict[tuple[str, str], Histogram] = {}  # by handler, method
        self._fine_duration_s = Histogram(HTTP_FINE_BUCKETS_S)

    @contextmanager
    def measured(self, request: web.Request) -> Iterator[None]:
        """Count `request` when the context ends, also by an exception."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._observe(request, time.monotonic() - began_s)

    def _observe(self, request: web.Request, duration_s: float) -> None:
        handler = self._template(request)
        if handler in NOT_COUNTED:
            return
        method = request.method if request.method in METHODS else "other"
        status = f"{request.get(STATUS, GONE) // 100}xx"
        self._num_requests[handler, method, status] += 1
        self._duration_s.setdefault((handler, method), Histogram(HTTP_BUCKETS_S)).observe(
            duration_s
        )
        self._fine_duration_s.observe(duration_s)

    def _template(self, request: web.Request) -> str:
        resource = request.match_info.route.resource
        if resource is None:
            return NO_ROUTE
        return resource.canonical.removeprefix(self._root_path).rstrip("/") or "/"

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "http_requests",
            "HTTP requests by route, method and class of status",
            labels=("handler", "method", "status"),
        )
        for labels, count in self._num_requests.items():
            requests.add_metric(labels, count)
        yield requests
        durations = HistogramMetricFamily(
            "http_request_duration_seconds",
            "From the head of an HTTP request to the end of its answer",
            labels=("handler", "method"),
        )
        for route, histogram in self._duration_s.items():
            durations.add_metric(route, histogram.cumulative(), histogram.total)
        yield durations
        fine = HistogramMetricFamily(
            "http_request_duration_highr_seconds", "The same of all routes, in finer buckets"
        )
        fine.add_metric((), self._fine_duration_s.cumulative(), self._fine_duration_s.total)
        yield fine
