"""Generates the stubs of polydev.runtime.v1 when the package is built."""

from pathlib import Path

import grpc_tools
from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO = "polydev/runtime/v1/runtime.proto"


class Stubs(BuildHookInterface):
    def initialize(self, version, build_data):
        root = Path(self.root)
        source = root / "../../proto"
        out = root / "src"
        arguments = [
            "protoc",
            f"--proto_path={source}",
            f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            PROTO,
        ]
        if protoc.main(arguments) != 0:
            raise RuntimeError(f"protoc does not take {source / PROTO}")
