"""A client of polydev-shim.

`Client.run` starts a command and is an async iterator over its events, which goes on over broken
connections and shims that are restarted: every byte comes once, in order. Every other call of
the API is in `Client.calls`, with the messages of `polydev.api`.
"""

from polydev.runtime.v1 import runtime_pb2 as api

from ._client import Client
from ._input import Closed
from ._run import Broken, DataLoss, Run, reason

__all__ = ["Broken", "Client", "Closed", "DataLoss", "Run", "api", "reason"]
