"""One run as its caller sees it. Its events continue when a connection breaks."""

from __future__ import annotations

import asyncio
import json
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

# Seconds for which the client tries to reach an accepted run again.
_PATIENCE = 60.0
# The same for a run that is not accepted yet, in seconds.
_PATIENCE_FIRST = 10.0
# Seconds between two tries: the first value, and the largest.
_RETRY = 0.05
_RETRY_MOST = 2.0
# Bytes. The CLI reads a longer prompt from stdin, and only the `Run` call gives it to a shim.
_PROMPT_IN_ARGV = 131_007

# Reason of a shim that is stopping: its runs continue through another shim.
_STOPPING = "STOPPING"

# Codes of a broken connection. With details, the error comes from the shim instead.
_BROKEN = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.CANCELLED,
}
# Events that show that the shim has the run, before anything else is known of it.
_CONNECTED = ("accepted", "queued", "approval_required")
_STREAMS = {"stdout": 0, "stderr": 1, "artifact_data": 2}
_LOST = {
    api.STREAM_STDOUT: 0,
    api.STREAM_STDERR: 1,
    api.STREAM_ARTIFACTS: 2,
    api.STREAM_EVENTS: 3,
}


class DataLoss(Exception):
    """Bytes of the run are missing, and the shim has not reported them as `lost`."""


class Broken(Exception):
    """The events cannot continue: the stream ended before the run's end, or the client was
    closed."""


def reason(error: BaseException) -> str | None:
    """The shim's reason of an error, such as NO_IDLE_SLOT. None if the shim did not send it."""
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
    """A run: an async iterator over its events (`api.RunEvent`). `accepted` comes once, every byte
    comes once and in order, and `exited` comes last. When the connection breaks or the shim
    restarts, the events continue where they stopped. After one minute without an answer it raises
    the last error; after ten seconds, if the run was not accepted yet. When the caller leaves the
    iterator, or when the wait for an event is cancelled, the run continues without the caller."""

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
        # None for a run that the client has attached to.
        self._request: api.RunStart | None = None
        self._accepted = self._started = self._told_artifacts = False
        self._told_api_errors = 0
        self._told_denied = 0
        # How many bytes of stdout, stderr and artifacts the caller has.
        self._read = [0, 0, 0, 0]
        self._broken_since: float | None = None
        self._retry = _RETRY
        self._events = self._follow()

    @classmethod
    def _start(
        cls, calls: RuntimeServiceStub, is_closed: Callable[[], bool], start: api.RunStart
    ) -> Run:
        request = api.RunStart()
        request.CopyFrom(start)
        # A given id may have been tried before, unless the caller says that it was not.
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
        run._read = [
            start.stdout_offset,
            start.stderr_offset,
            start.artifact_offset,
            start.event_offset,
        ]
        return run

    async def write(self, data: bytes) -> None:
        """Writes input: the bytes of the files that have their `size` in the start message, one
        file after the other, and then the command's stdin. Waits while 1 MiB of input is unsent.
        Input is sent only while the caller reads the run's events, so write more than 1 MiB
        concurrently with reading. Raises `Closed` when the run has ended or its stdin is closed.
        For a run that the client has attached to, the input is stdin from `stdin_offset` of
        `accepted` on. A caller that continues the input of an earlier caller must start at this
        offset, even if the earlier caller had sent more."""
        await self._input.write(data)

    async def prompt(self, text: str, model: str = "") -> None:
        """Writes the next prompt of a conversation to its stdin. An empty model is that of the
        prompt before. Await one line before the next: those of two tasks would be mixed."""
        await self._say({"prompt": {"text": text, "model": model}})

    async def cancel_turn(self) -> None:
        """Ends the answer to the prompt before."""
        await self._say({"cancel_turn": {}})

    async def _say(self, line: dict) -> None:
        await self.write(json.dumps(line).encode() + b"\n")

    def close_stdin(self) -> None:
        """Closes the input: the command reads end of file."""
        self._input.close()

    def signal(self, number: int) -> None:
        """Sends a signal to the command, before any stdin that is not sent yet."""
        self._input.send(api.RunInput(signal=api.Signal(number=number)))

    def resize(self, rows: int, columns: int) -> None:
        """Sets the size of the terminal."""
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
        """Ends the events. The run continues without the caller."""
        await self._events.aclose()

    async def _follow(self) -> AsyncIterator[api.RunEvent]:
        try:
            while True:
                call = self._open()
                try:
                    async for response in call:
                        if response.event.WhichOneof("event") in _CONNECTED:
                            self._broken_since = None
                        event = self._news(response.event)
                        if event is not None:
                            # Only news resets the pause: a call that breaks before any news is
                            # not repeated at once.
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
                    # The library's errors for a closed channel, unless the task is cancelled.
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
        # `Run` also attaches to a run that exists, from its first byte. A prompt that is stdin
        # needs `Run` again: the previous shim may have died before it had passed the whole prompt
        # on.
        if request and (not self._started or len(request.prompt.text.encode()) > _PROMPT_IN_ARGV):
            first = api.RunRequest()
            first.start.CopyFrom(request)
            # Whatever happens to this call, the next call is another try.
            request.attempt += 1
            return self._calls.Run(self._requests(first, api.RunRequest, number))
        stdout, stderr, artifacts, events = self._read
        start = api.AttachStart(
            run_id=self.run_id,
            user_id=self._user_id,
            stdout_offset=stdout,
            stderr_offset=stderr,
            artifact_offset=artifacts,
            event_offset=events,
        )
        first = api.AttachRequest(start=start)
        return self._calls.Attach(self._requests(first, api.AttachRequest, number))

    async def _requests(self, first, kind, number: int):
        yield first
        while (input := await self._input.next(number)) is not None:
            yield kind(input=input)

    def _news(self, event: api.RunEvent) -> api.RunEvent | None:
        """The part of an event that the caller does not have yet; None if there is none."""
        kind = event.WhichOneof("event")
        if kind == "accepted":
            try:
                self._input.go_on(event.accepted)
            except Gone as gone:
                raise DataLoss(str(gone)) from None
            is_first, self._accepted = not self._accepted, True
            return event if is_first else None
        if kind in ("queued", "approval_required"):
            return None if self._accepted else event
        if kind == "started":
            is_first, self._started = not self._started, True
            return event if is_first else None
        if kind == "artifacts":
            is_first, self._told_artifacts = not self._told_artifacts, True
            return event if is_first else None
        if kind == "api_errors":
            count = sum(error.count for error in event.api_errors.errors)
            if count <= self._told_api_errors:
                return None
            self._told_api_errors = count
            return event
        if kind == "egress_denied":
            destinations = event.egress_denied.destinations
            del destinations[: self._told_denied]
            self._told_denied += len(destinations)
            return event if destinations else None
        if kind in _STREAMS:
            stream, output = _STREAMS[kind], getattr(event, kind)
            read, end = self._read[stream], output.offset + len(output.data)
            if output.offset > read:
                raise DataLoss(f"the shim continues at byte {output.offset} after byte {read}")
            if end <= read:
                return None
            output.data = output.data[read - output.offset :]
            output.offset = read
            self._read[stream] = end
            return event
        if kind == "agent_events":
            # A caller gets whole ones, and continues after the last.
            end, read = event.agent_events.end_offset, self._read[3]
            self._read[3] = max(end, read)
            return event if end > read else None
        if kind == "lost" and event.lost.stream in _LOST:
            lost, stream = event.lost, _LOST[event.lost.stream]
            if lost.to <= self._read[stream]:
                return None
            setattr(lost, "from", max(getattr(lost, "from"), self._read[stream]))
            self._read[stream] = lost.to
            return event
        return event if kind else None

    def _may_go_on(self, error: Exception) -> bool:
        """Whether another call may succeed after this error."""
        if isinstance(error, grpc.aio.AioRpcError):
            is_ours = reason(error) is not None
            is_broken = error.code() in _BROKEN and not is_ours
            # The shim has lost the node, so the client must ask what happened to the run.
            is_unclear = error.code() == grpc.StatusCode.ABORTED and is_ours
            # Repeat the call for a run that exists. The caller decides whether to repeat a first
            # call.
            exists = self._accepted or self._broken_since or reason(error) == _STOPPING
            again = exists and _detail(error, error_details_pb2.RetryInfo)
            if not (is_broken or is_unclear or again):
                return False
        since = self._broken_since
        patience = _PATIENCE if self._accepted else _PATIENCE_FIRST
        return since is None or time.monotonic() - since < patience
