#!/usr/bin/env python3
"""Generates attnd/_proto/ (protobuf classes, their type stubs, gRPC stubs) from proto/attnd.proto.

Run it once before using the package from the source tree; the package build runs it by itself.
Needs grpcio-tools.
"""

from __future__ import annotations

import sys
from pathlib import Path

CLIENT = Path(__file__).resolve().parent
PROTO = CLIENT.parent / "proto" / "attnd.proto"
PACKAGE = Path("attnd") / "_proto"


def is_current() -> bool:
    """Whether the generated code is there and newer than the proto (which a source archive lacks)."""
    generated = CLIENT / PACKAGE / "attnd_pb2.py"
    return generated.exists() and (not PROTO.exists() or generated.stat().st_mtime > PROTO.stat().st_mtime)


def generate() -> None:
    """Writes the generated modules. Raises RuntimeError if protoc fails."""
    if not PROTO.exists():
        raise RuntimeError(f"{PROTO} is missing: generate from a full checkout")
    from grpc_tools import protoc  # only needed here

    package = CLIENT / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text('"""Generated from proto/attnd.proto by generate.py."""\n')
    # The proto is mapped to the package's own path, so that the generated modules import each other by full name.
    status = protoc.main(
        [
            "protoc",
            f"--proto_path={PACKAGE.as_posix()}={PROTO.parent}",
            f"--python_out={CLIENT}",
            f"--pyi_out={CLIENT}",
            f"--grpc_python_out={CLIENT}",
            f"{PACKAGE.as_posix()}/{PROTO.name}",
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status}")


def runtime_requirement() -> str:
    """The protobuf versions that can run the generated code: its own, and up to the end of the next major."""
    text = (CLIENT / PACKAGE / "attnd_pb2.py").read_text()
    version = text.split("# Protobuf Python Version:", 1)[1].split(None, 1)[0]
    return f"protobuf>={version},<{int(version.split('.')[0]) + 2}"


if __name__ == "__main__":
    if "--if-needed" not in sys.argv[1:] or not is_current():
        generate()
