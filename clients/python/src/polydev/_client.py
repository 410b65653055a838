"""The connection to a shim, and the identity of its caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import grpc
from polydev.runtime.v1 import runtime_pb2 as api
from polydev.runtime.v1.runtime_pb2_grpc import RuntimeServiceStub

from ._run import Run

# Milliseconds between pings, and to wait for an answer: the other machine may be down.
_ALIVE = 20_000


class Client:
    """A connection to a shim, or to a proxy in front of several shims. When the connection breaks,
    the next call makes a new one.

    `address` is unix:///PATH, http://127.0.0.1:PORT or https://HOST:PORT. An https address needs
    `tls_ca`, and either `tls_cert` with `tls_key` or a `token`. `token` is a function that returns
    the token; the client calls it for each call of the API. `metadata` is sent with each call,
    such as the trace context (`traceparent`).
    """

    def __init__(
        self,
        address: str,
        *,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
        token: Callable[[], str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ):
        options = [
            ("grpc.keepalive_time_ms", _ALIVE),
            ("grpc.keepalive_timeout_ms", _ALIVE),
            ("grpc.http2.max_pings_without_data", 0),
            # A proxy for web traffic does not fit this connection.
            ("grpc.enable_http_proxy", 0),
            # The same pauses as between two tries to reach a run.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]
        added = _Added(token, metadata or {})
        interceptors = [_Unary(added), _UnaryStream(added), _StreamStream(added)]
        url = urlsplit(address)
        if url.scheme == "https" and url.netloc and url.path in ("", "/"):
            credentials = grpc.ssl_channel_credentials(
                _read(tls_ca), _read(tls_key), _read(tls_cert)
            )
            target = url.netloc if url.port else f"{url.netloc}:443"
            self._channel = grpc.aio.secure_channel(target, credentials, options, None, interceptors)
        elif (url.scheme == "unix" and not url.netloc and url.path) or (
            url.scheme == "http"
            and url.hostname in ("127.0.0.1", "::1", "localhost")
            and url.port
            and url.path in ("", "/")
        ):
            target = address if url.scheme == "unix" else url.netloc
            if url.scheme == "unix":
                # By default the library sends the path, which is not a valid HTTP authority.
                options.append(("grpc.default_authority", "localhost"))
            self._channel = grpc.aio.insecure_channel(target, options, None, interceptors)
        else:
            raise ValueError(
                f"`{address}` is neither unix:///PATH nor http://127.0.0.1:PORT nor https://HOST:PORT"
            )
        self._closed = False
        #: Every call of the API, without the handling of `Run`.
        self.calls = RuntimeServiceStub(self._channel)

    def run(self, start: api.RunStart) -> Run:
        """Runs a command. If `run_id` is empty, the client makes one from this machine's clock, so
        that the command is started once, however often the connection breaks. A given `run_id`
        may have been tried before by another process, so the shim asks every node first.
        `attempt=1` says that the id was never tried, and the shim does not ask. The client sends
        nothing until the caller asks for the events."""
        return Run._start(self.calls, lambda: self._closed, start)

    def attach(self, start: api.AttachStart) -> Run:
        """Continues a run from the given offsets."""
        return Run._attach(self.calls, lambda: self._closed, start)

    async def close(self) -> None:
        """Ends all active calls. Their runs continue."""
        self._closed = True
        await self._channel.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()


def _read(path: str | Path | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


class _Added:
    """Metadata and token for each call."""

    def __init__(self, token: Callable[[], str] | None, metadata: Mapping[str, str]):
        self._token = token
        self._metadata = metadata

    def to(self, details: grpc.aio.ClientCallDetails) -> grpc.aio.ClientCallDetails:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        for name, value in self._metadata.items():
            metadata.add(name, value)
        if self._token:
            metadata.add("authorization", f"Bearer {self._token()}")
        return grpc.aio.ClientCallDetails(
            details.method,
            details.timeout,
            metadata,
            details.credentials,
            details.wait_for_ready,
        )


# The library requires a separate class for each kind of call.
class _Unary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, added: _Added):
        self._added = added

    async def intercept_unary_unary(self, continuation, details, request):
        return await continuation(self._added.to(details), request)


class _UnaryStream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, added: _Added):
        self._added = added

    async def intercept_unary_stream(self, continuation, details, request):
        return await continuation(self._added.to(details), request)


class _StreamStream(grpc.aio.StreamStreamClientInterceptor):
    def __init__(self, added: _Added):
        self._added = added

    async def intercept_stream_stream(self, continuation, details, requests):
        return await continuation(self._added.to(details), requests)
