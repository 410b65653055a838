"""The connection to a shim, and who its caller is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import grpc
from polydev.runtime.v1 import runtime_pb2 as api
from polydev.runtime.v1.runtime_pb2_grpc import RuntimeServiceStub

from ._run import Run

# Of milliseconds: between pings, and for the answer to one. The machine at the other end may
# have died.
_ALIVE = 20_000


class Client:
    """A connection to a shim, or to whatever stands in front of several. When it breaks, the
    next call makes a new one.

    `address` is unix:///PATH, http://127.0.0.1:PORT or https://HOST:PORT. The last needs
    `tls_ca`, and `tls_cert` with `tls_key` or a `token`: a function that is asked for each call.
    `metadata` goes with each call, such as the place in a trace (`traceparent`).
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
            # A proxy of the web's is none for this.
            ("grpc.enable_http_proxy", 0),
            # As often as a run is tried to be reached again.
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
                # The library would send the path, which is no authority in HTTP.
                options.append(("grpc.default_authority", "localhost"))
            self._channel = grpc.aio.insecure_channel(target, options, None, interceptors)
        else:
            raise ValueError(
                f"`{address}` is neither unix:///PATH nor http://127.0.0.1:PORT nor https://HOST:PORT"
            )
        self._closed = False
        #: Every call of the API, as it is.
        self.calls = RuntimeServiceStub(self._channel)

    def run(self, start: api.RunStart) -> Run:
        """Runs a command. Without a `run_id` it gets one here, of this machine's clock, so that
        it is started once however often the connection breaks. One that is given may have been
        tried before, by another process: every node is asked first, unless `attempt` is 1, which
        says that it was not. Nothing is sent before its events are asked for."""
        return Run._start(self.calls, lambda: self._closed, start)

    def attach(self, start: api.AttachStart) -> Run:
        """Goes on with a run, from those offsets."""
        return Run._attach(self.calls, lambda: self._closed, start)

    async def close(self) -> None:
        """Breaks off the calls that go on. Their runs are left to themselves."""
        self._closed = True
        await self._channel.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()


def _read(path: str | Path | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()


class _Added:
    """What goes with each call."""

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


# The library takes a class of its own for each kind of call.
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
