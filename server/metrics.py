"""Request metrics for Prometheus, as an ASGI middleware: BaseHTTPMiddleware would cost more than a blob's read."""

from __future__ import annotations

import time

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # seconds


class Metrics:
    """Counters of one application, by route template (never by raw path: that would have no bound)."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "cubinery_http_requests", "Requests answered.", ("route", "method", "status"), registry=self.registry
        )
        self.bytes = Counter(
            "cubinery_http_response_body_bytes", "Bytes of bodies sent.", ("route",), registry=self.registry
        )
        self.seconds = Histogram(
            "cubinery_http_request_duration_seconds",
            "Time from a request's arrival to its last byte.",
            ("route",),
            buckets=_BUCKETS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def observe(self, scope: Scope, status: int, sent: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in ("GET", "HEAD") else "other"
        self.requests.labels(route, method, str(status)).inc()
        self.bytes.labels(route).inc(sent)
        self.seconds.labels(route).observe(seconds)


class MetricsMiddleware:
    """Counts what passes through it."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, sent, start = 500, 0, time.perf_counter()

        async def counting_send(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and scope["method"] != "HEAD":  # its body stays here
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, counting_send)
        finally:
            self.metrics.observe(scope, status, sent, time.perf_counter() - start)
