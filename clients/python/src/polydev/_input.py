"""The input that a caller sends to a run. It is kept until no broken connection can lose it."""

from __future__ import annotations

import asyncio
from collections import deque

from polydev.runtime.v1 import runtime_pb2 as api

# Most bytes that the API accepts in one message.
_CHUNK = 64 << 10
# Most bytes that may wait to be sent. A caller that writes more has to wait.
_WAITING_MOST = 1 << 20
# Bytes that are kept after they were sent. This is more than the path from the caller to the
# command holds when all windows on it are full.
_KEPT = 8 << 20
# Most signals and sizes that may wait to be sent. Further ones are dropped.
_SIGNALS_MOST = 64


class Closed(Exception):
    """The run accepts no more input."""


class Gone(Exception):
    """A broken connection has lost bytes that are no longer kept."""


class Input:
    """One stream of bytes: the run's files, and then its stdin."""

    def __init__(self, files: int, *, is_new: bool, is_attached: bool = False):
        self._files = files
        self._is_attached = is_attached
        # Offset of the first byte in the run's stdin, if others have written to the run before.
        self._origin: int | None = None
        # The last bytes that were sent, from `_begin` to `_sent`, in pieces. No piece has bytes of
        # both files and stdin. The bytes in `_waiting` follow at `_sent`.
        self._kept: deque[bytearray] = deque()
        self._waiting: deque[bytes] = deque()
        self._begin = self._sent = self._end = 0
        # How many bytes the run has beyond those written here: an earlier caller sent them.
        self._skip = 0
        # Whether it is known how much input the run has. Only then may waiting bytes be sent.
        self._known = is_new
        self._call = 0
        self._closed = self._close_sent = self._over = False
        self._urgent: deque[api.RunInput] = deque()
        # The last size of the terminal. The next call sends it again.
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
        """Sends a message before any waiting bytes."""
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
        """Begins a new call in place of the call that broke. Except for the first call, it is not
        known yet how much input the run has."""
        self._call += 1
        if self._call > 1:
            self._known = False
            if self._size:
                self.send(self._size)
        self._close_sent = False
        self._tell()
        return self._call

    def go_on(self, accepted: api.Accepted) -> None:
        """Continues the call after the input that the run has according to `accepted`."""
        if self._is_attached:
            if self._origin is None:
                self._origin = accepted.stdin_offset
            # The run has more if others send input as well.
            has = min(max(accepted.stdin_offset - self._origin, 0), self._end)
        else:
            has = min(accepted.files_offset, self._files) + accepted.stdin_offset
        if not self._known:
            self._seek(has)
        self._tell()

    async def next(self, call: int) -> api.RunInput | None:
        """The next message of the given call; None when a new call has begun or the run has ended.
        In all other cases it waits for a message, because the end of the messages would close the
        command's stdin."""
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
        """Moves to the offset `has`: the bytes from there on wait to be sent."""
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
        """Skips waiting bytes that the run already has."""
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
        # Many small pieces would take more memory than their bytes.
        if self._kept and len(self._kept[-1]) + len(piece) <= _CHUNK and not is_first_of_stdin:
            self._kept[-1] += piece
        else:
            self._kept.append(bytearray(piece))
        while self._kept and self._begin + len(self._kept[0]) + _KEPT <= self._sent:
            self._begin += len(self._kept.popleft())

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
