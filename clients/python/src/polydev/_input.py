"""What a caller sends to a run: kept until no broken connection can lose it any more."""

from __future__ import annotations

import asyncio
from collections import deque

from polydev.runtime.v1 import runtime_pb2 as api

# The most the API takes in one message.
_CHUNK = 64 << 10
# Bytes that wait to be sent before whoever writes more has to wait.
_WAITING_MOST = 1 << 20
# Bytes that are kept after they were sent: more than lie between caller and command, with all
# windows on the way full.
_KEPT = 8 << 20
# Signals that wait to be sent; further ones are left out.
_SIGNALS_MOST = 64


class Closed(Exception):
    """The run takes no more input."""


class Gone(Exception):
    """Bytes that a broken connection has lost."""


class Input:
    """One stream of bytes: those of the run's files, then its stdin."""

    def __init__(self, files: int, *, is_new: bool, is_attached: bool = False):
        self._files = files
        self._is_attached = is_attached
        # Where the first byte is in the stdin of a run that others have written to.
        self._origin: int | None = None
        # The last of it, in pieces, none with bytes of files and of stdin.
        self._log: deque[bytes] = deque()
        self._begin = self._end = 0
        # Up to here the call that is open has sent it; None until it is known where it begins.
        self._sent: int | None = 0 if is_new else None
        self._call = 0
        self._closed = self._close_sent = self._over = False
        self._urgent: deque[api.RunInput] = deque()
        self._changed = asyncio.Event()

    async def write(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if self._over or self._closed:
                raise Closed("the run takes no more input")
            if self._end - (self._begin if self._sent is None else self._sent) >= _WAITING_MOST:
                await self._changed.wait()
                continue
            files_left = self._files - self._end
            size = min(files_left, _CHUNK) if files_left > 0 else _CHUNK
            piece = bytes(data[at : at + size])
            at += len(piece)
            self._end += len(piece)
            self._log.append(piece)
            self._tell()

    def close(self) -> None:
        self._closed = True
        self._tell()

    def send(self, message: api.RunInput) -> None:
        """A message that goes before any bytes."""
        if message.WhichOneof("input") == "resize":
            kept = (m for m in self._urgent if m.WhichOneof("input") != "resize")
            self._urgent = deque(kept)
        if len(self._urgent) < _SIGNALS_MOST:
            self._urgent.append(message)
        self._tell()

    def end(self) -> None:
        self._over = True
        self._tell()

    def next_call(self) -> int:
        """Begins another call, in place of the one that broke; it is not known yet how much
        the run has, unless it is the first."""
        self._call += 1
        if self._call > 1:
            self._sent = None
        self._close_sent = False
        self._tell()
        return self._call

    def go_on(self, accepted: api.Accepted) -> None:
        """The run has so much, and the call goes on from there."""
        if self._is_attached:
            if self._origin is None:
                self._origin = accepted.stdin_offset
            # It has more if others send as well.
            has = min(max(accepted.stdin_offset - self._origin, 0), self._end)
        else:
            has = min(accepted.files_offset, self._files) + accepted.stdin_offset
        if self._sent is None:
            if has < self._begin:
                raise Gone(
                    f"the run has {has} bytes of its input, "
                    f"and those from {self._begin} on are kept"
                )
            self._sent = has
        self._tell()

    async def next(self, call: int) -> api.RunInput:
        """What that call is to send next. Never returns once there is another call, or
        nothing left: the end of the messages would close the command's stdin."""
        while True:
            changed = self._changed
            message = self._next(call)
            if message is not None:
                self._tell()
                return message
            await changed.wait()

    def _next(self, call: int) -> api.RunInput | None:
        if call != self._call or self._over:
            return None
        if self._urgent:
            return self._urgent.popleft()
        if self._sent is None:
            return None
        # More, if the run has had it from an earlier caller.
        if self._sent >= self._end:
            if not self._closed or self._close_sent:
                return None
            self._close_sent = True
            return api.RunInput(close_stdin=api.CloseStdin())
        is_file = self._sent < self._files
        piece = self._piece_at(self._sent)
        self._sent += len(piece)
        while self._log and self._begin + len(self._log[0]) + _KEPT <= self._sent:
            self._begin += len(self._log.popleft())
        return api.RunInput(files=piece) if is_file else api.RunInput(stdin=piece)

    def _piece_at(self, offset: int) -> bytes:
        begin = self._begin
        for piece in self._log:
            if offset < begin + len(piece):
                return piece[offset - begin :]
            begin += len(piece)
        raise AssertionError("what is not sent is in the log")

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
