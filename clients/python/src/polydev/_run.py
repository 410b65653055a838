"""One run as its caller sees it: events that no broken connection ends."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable

import grpc
import uuid6
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from polydev.runtime.v1 import runtime_pb2 as api
from polydev.runtime.v1.runtime_pb2_grpc import RuntimeServiceStub

from ._input import Gone, Input

# Seconds that a run is tried to be reached again.
_PATIENCE = 60.0
# As long as it is not known whether there is one.
_PATIENCE_FIRST = 10.0
# Between two tries at first, and at most.
_RETRY = 0.05
_RETRY_MOST = 2.0
# A longer prompt is the CLI's stdin, which the shim has from the first call alone.
_PROMPT_IN_ARGV = 131_007

# A shim hands its runs over.
_STOPPING = "STOPPING"

# The connection's words, unless they have details, which are the shim's.
_BROKEN = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
}
_STREAMS = {"stdout": 0, "stderr": 1, "artifact_data": 2}
_LOST = {api.STREAM_STDOUT: 0, api.STREAM_STDERR: 1, api.STREAM_ARTIFACTS: 2}


class DataLoss(Exception):
    """Bytes of the run are missing that nobody has declared lost."""


class Broken(Exception):
    """The run cannot be followed any more: the stream ended before the run's end, or the client
    was closed."""


def reason(error: BaseException) -> str | None:
    """The shim's word for an error, such as NO_IDLE_SLOT; None if it is not the shim's."""
    if not isinstance(error, grpc.RpcError):
        return None
    info = _detail(error, error_details_pb2.ErrorInfo)
    return info.reason if info else None


def _detail(error, kind):
    status = rpc_status.from_call(error)
    for detail in status.details if status else ():
        if detail.Is(kind.DESCRIPTOR):
            message = kind()
            detail.Unpack(message)
            return message
    return None


class Run:
    """A run: an async iterator over its events (`api.RunEvent`). `accepted` comes once, every
    byte once and in order, and `exited` last. When the connection breaks, or the shim is
    restarted, it goes on where it was; after a minute without an answer (ten seconds, if it was
    not accepted yet) it raises the last error.
    Leaving it leaves the run to itself, and so does whatever cancels the wait for an event."""

    def __init__(
        self,
        calls: RuntimeServiceStub,
        is_closed: Callable[[], bool],
        run_id: str,
        user_id: str,
        input: Input,
    ):
        self._calls = calls
        self._is_closed = is_closed
        #: The run's UUID.
        self.run_id = run_id
        self._user_id = user_id
        self._input = input
        # None for a run that somebody else has started.
        self._request: api.RunStart | None = None
        self._accepted = self._started = self._told_artifacts = False
        # How much of stdout, stderr and artifacts the caller has.
        self._read = [0, 0, 0]
        self._broken_since: float | None = None
        self._retry = _RETRY
        self._events = self._follow()

    @classmethod
    def _start(
        cls, calls: RuntimeServiceStub, is_closed: Callable[[], bool], start: api.RunStart
    ) -> Run:
        request = api.RunStart()
        request.CopyFrom(start)
        # An id that was given may have been tried before, unless it is said that it was not.
        request.attempt = request.attempt or (2 if request.run_id else 1)
        request.run_id = request.run_id or request.lease_id or str(uuid6.uuid7())
        files = sum(file.size for file in request.files)
        input = Input(files, is_new=request.attempt == 1)
        run = cls(calls, is_closed, request.run_id, request.user_id, input)
        run._request = request
        return run

    @classmethod
    def _attach(
        cls, calls: RuntimeServiceStub, is_closed: Callable[[], bool], start: api.AttachStart
    ) -> Run:
        input = Input(0, is_new=False, is_attached=True)
        run = cls(calls, is_closed, start.run_id, start.user_id, input)
        run._read = [start.stdout_offset, start.stderr_offset, start.artifact_offset]
        return run

    async def write(self, data: bytes) -> None:
        """The bytes of the files whose `size` the run was told, one file's after the other's,
        and then the command's stdin. Waits while 1 MiB has not been sent, which happens only
        while somebody asks for the run's events: write more than that beside it. Raises
        `Closed` once the run is over or its stdin closed. For a run that was attached to it is
        stdin, from `stdin_offset` of its `accepted` on: who goes on with what an earlier caller
        sent begins there, and not after what that one had sent."""
        await self._input.write(data)

    def close_stdin(self) -> None:
        """No more follows: the command reads end of file."""
        self._input.close()

    def signal(self, number: int) -> None:
        """A signal for the command, before whatever of its stdin is still to be sent."""
        self._input.send(api.RunInput(signal=api.Signal(number=number)))

    def resize(self, rows: int, columns: int) -> None:
        """The terminal has another size."""
        size = api.TerminalSize(rows=rows, columns=columns)
        self._input.send(api.RunInput(resize=size))

    async def cancel(self) -> None:
        """Ends the run: SIGTERM at once, SIGKILL after its kill timeout."""
        request = api.CancelRunRequest(run_id=self.run_id, user_id=self._user_id)
        await self._calls.CancelRun(request)

    def __aiter__(self) -> Run:
        return self

    async def __anext__(self) -> api.RunEvent:
        return await anext(self._events)

    async def aclose(self) -> None:
        """Leaves the run to itself."""
        await self._events.aclose()

    async def _follow(self) -> AsyncIterator[api.RunEvent]:
        try:
            while True:
                call = self._open()
                try:
                    async for response in call:
                        if response.event.WhichOneof("event") in ("accepted", "queued"):
                            self._broken_since = None
                        event = self._news(response.event)
                        if event is not None:
                            # One that breaks again and again before there is anything is not
                            # asked at once.
                            self._retry = _RETRY
                            is_last = event.WhichOneof("event") == "exited"
                            if is_last:
                                self._input.end()
                            yield event
                            if is_last:
                                return
                    raise Broken("the shim ended the stream before the run's end")
                except (grpc.aio.AioRpcError, Broken) as error:
                    if not self._may_go_on(error):
                        raise
                except (asyncio.CancelledError, grpc.aio.UsageError):
                    # The library's word for a channel that is closed, unless the task is cancelled.
                    task = asyncio.current_task()
                    if self._is_closed() and not (task and task.cancelling()):
                        raise Broken("the client was closed") from None
                    raise
                finally:
                    call.cancel()
                self._broken_since = self._broken_since or time.monotonic()
                self._retry = min(self._retry * 2, _RETRY_MOST)
                await asyncio.sleep(self._retry * random.uniform(0.5, 1.0))
        finally:
            self._input.end()

    def _open(self):
        number = self._input.next_call()
        request = self._request
        # A run that exists is attached to by `Run` as well, from its first byte. The shim that
        # broke may have had some of what it reads.
        if request and (not self._started or len(request.prompt.text.encode()) > _PROMPT_IN_ARGV):
            first = api.RunRequest()
            first.start.CopyFrom(request)
            # Whatever becomes of this call, the next one is another try.
            request.attempt += 1
            return self._calls.Run(self._requests(first, api.RunRequest, number))
        stdout, stderr, artifacts = self._read
        start = api.AttachStart(
            run_id=self.run_id,
            user_id=self._user_id,
            stdout_offset=stdout,
            stderr_offset=stderr,
            artifact_offset=artifacts,
        )
        first = api.AttachRequest(start=start)
        return self._calls.Attach(self._requests(first, api.AttachRequest, number))

    async def _requests(self, first, kind, number: int):
        yield first
        while (input := await self._input.next(number)) is not None:
            yield kind(input=input)

    def _news(self, event: api.RunEvent) -> api.RunEvent | None:
        """What of an event the caller does not have yet."""
        kind = event.WhichOneof("event")
        if kind == "accepted":
            try:
                self._input.go_on(event.accepted)
            except Gone as gone:
                raise DataLoss(str(gone)) from None
            is_first, self._accepted = not self._accepted, True
            return event if is_first else None
        if kind == "queued":
            return None if self._accepted else event
        if kind == "started":
            is_first, self._started = not self._started, True
            return event if is_first else None
        if kind == "artifacts":
            is_first, self._told_artifacts = not self._told_artifacts, True
            return event if is_first else None
        if kind in _STREAMS:
            stream, output = _STREAMS[kind], getattr(event, kind)
            read, end = self._read[stream], output.offset + len(output.data)
            if output.offset > read:
                raise DataLoss(f"the shim goes on at byte {output.offset} after byte {read}")
            if end <= read:
                return None
            output.data = output.data[read - output.offset :]
            output.offset = read
            self._read[stream] = end
            return event
        if kind == "lost" and event.lost.stream in _LOST:
            lost, stream = event.lost, _LOST[event.lost.stream]
            if lost.to <= self._read[stream]:
                return None
            setattr(lost, "from", max(getattr(lost, "from"), self._read[stream]))
            self._read[stream] = lost.to
            return event
        return event if kind else None

    def _may_go_on(self, error: Exception) -> bool:
        """Whether another call may bring what this one did not."""
        if isinstance(error, grpc.aio.AioRpcError):
            is_ours = reason(error) is not None
            is_broken = error.code() in _BROKEN and not is_ours
            # The shim has lost the node: what became of the run is to be asked for.
            is_unclear = error.code() == grpc.StatusCode.ABORTED and is_ours
            # Worth another try for a run that exists; a first call is its caller's to repeat.
            exists = self._accepted or self._broken_since or reason(error) == _STOPPING
            again = exists and _detail(error, error_details_pb2.RetryInfo)
            if not (is_broken or is_unclear or again):
                return False
        since = self._broken_since
        patience = _PATIENCE if self._accepted else _PATIENCE_FIRST
        return since is None or time.monotonic() - since < patience
