"""A collector of OpenTelemetry spans that speaks OTLP over HTTP, on the loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector(BaseHTTPRequestHandler):
    """Keeps what is exported to /v1/traces."""

    received: list[ExportTraceServiceRequest]

    def do_POST(self) -> None:
        """One export."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Content-Type"] == "application/x-protobuf"
        if self.path == "/v1/traces":
            self.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Quiet."""


@contextmanager
def collecting() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """A running collector: its base URL, and what it has received so far."""
    received: list[ExportTraceServiceRequest] = []
    server = HTTPServer(("127.0.0.1", 0), type("Mine", (Collector,), {"received": received}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def spans_of(received: list[ExportTraceServiceRequest]) -> list[Span]:
    """All spans, in the order of their arrival."""
    resources = [resource for request in received for resource in request.resource_spans]
    return [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
