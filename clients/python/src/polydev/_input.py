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
        # The last of what was sent, in pieces, none with bytes of files and of stdin; from
        # `_begin` to `_sent`, where what waits begins.
        self._kept: deque[bytearray] = deque()
        self._waiting: deque[bytes] = deque()
        self._begin = self._sent = self._end = 0
        # The run has so much more than was written here, from an earlier caller.
        self._skip = 0
        # It is known how much the run has, so that what waits may be sent.
        self._known = is_new
        self._call = 0
        self._closed = self._close_sent = self._over = False
        self._urgent: deque[api.RunInput] = deque()
        # The last size of the terminal, for the next call to tell again.
        self._size: api.RunInput | None = None
        self._changed = asyncio.Event()

    async def write(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if self._over or self._closed:
                raise Closed("the run takes no more input")
            if self._end - self._sent >= _WAITING_MOST:
                await self._changed.wait()
                continue
            files_left = self._files - self._end
            size = min(files_left, _CHUNK) if files_left > 0 else _CHUNK
            piece = bytes(data[at : at + size])
            at += len(piece)
            self._end += len(piece)
            self._waiting.append(piece)
            if self._skip:
                self._pass(self._sent + self._skip)
            self._tell()

    def close(self) -> None:
        self._closed = True
        self._tell()

    def send(self, message: api.RunInput) -> None:
        """A message that goes before any bytes."""
        if message.WhichOneof("input") == "resize":
            self._size = message
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
            self._known = False
            if self._size:
                self.send(self._size)
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
        if not self._known:
            self._seek(has)
        self._tell()

    async def next(self, call: int) -> api.RunInput | None:
        """What that call is to send next; None once there is another call or the run is over.
        Otherwise it waits: the end of the messages would close the command's stdin."""
        while call == self._call and not self._over:
            changed = self._changed
            message = self._next()
            if message is not None:
                self._tell()
                return message
            await changed.wait()
        return None

    def _next(self) -> api.RunInput | None:
        if self._urgent:
            return self._urgent.popleft()
        if not self._known:
            return None
        if not self._waiting:
            if not self._closed or self._close_sent:
                return None
            self._close_sent = True
            return api.RunInput(close_stdin=api.CloseStdin())
        is_file = self._sent < self._files
        piece = self._waiting.popleft()
        self._keep(piece)
        return api.RunInput(files=piece) if is_file else api.RunInput(stdin=piece)

    def _seek(self, has: int) -> None:
        """The run has so much: what follows waits to be sent."""
        if has < self._begin:
            raise Gone(
                f"the run has {has} bytes of its input, and those from {self._begin} on are kept"
            )
        while has < self._sent:
            piece = self._kept.pop()
            begin = self._sent - len(piece)
            had = max(has - begin, 0)
            if had:
                self._kept.append(piece[:had])
            self._sent = begin + had
            self._waiting.appendleft(bytes(piece[had:]))
        self._pass(has)
        self._known = True

    def _pass(self, has: int) -> None:
        """What the run has of what waits need not be sent."""
        while self._sent < has and self._waiting:
            piece = self._waiting.popleft()
            had = min(has - self._sent, len(piece))
            if had < len(piece):
                self._waiting.appendleft(piece[had:])
            self._keep(piece[:had])
        self._skip = max(has - self._sent, 0)

    def _keep(self, piece: bytes) -> None:
        is_first_of_stdin = self._sent == self._files
        self._sent += len(piece)
        # Many small ones would take more than their bytes.
        if self._kept and len(self._kept[-1]) + len(piece) <= _CHUNK and not is_first_of_stdin:
            self._kept[-1] += piece
        else:
            self._kept.append(bytearray(piece))
        while self._kept and self._begin + len(self._kept[0]) + _KEPT <= self._sent:
            self._begin += len(self._kept.popleft())

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
