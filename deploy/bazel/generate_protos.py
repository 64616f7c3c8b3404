"""Generates Python from contracts: generate_protos.py OUTPUT FILE..., files below protos/."""

from __future__ import annotations

import importlib.resources
import sys
import sysconfig

from grpc_tools import protoc


def main(output: str, *files: str) -> int:
    # site-packages holds google/rpc/*.proto, grpc_tools itself google/protobuf/*.proto.
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    sources = ("protos", sysconfig.get_path("purelib"), str(well_known))
    arguments = ["protoc", *(f"-I{folder}" for folder in sources)]
    arguments += [f"--python_out={output}", f"--grpc_python_out={output}", *files]
    status: int = protoc.main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
