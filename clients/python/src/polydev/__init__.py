"""A client of polydev-shim.

`Client.run` starts a command and returns an async iterator over its events. The events continue
when a connection breaks or a shim restarts: every byte comes once and in order. Every other call
of the API is in `Client.calls`. The messages are in `polydev.api`.
"""

from polydev.runtime.v1 import runtime_pb2 as api

from ._client import Client
from ._input import Closed
from ._run import Broken, DataLoss, Run, reason

__all__ = ["Broken", "Client", "Closed", "DataLoss", "Run", "api", "reason"]
