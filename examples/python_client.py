"""Streams an answer over gRPC, with the package switchgear_client.

    python examples/python_client.py 127.0.0.1:50051 "What is a dynamo?"

`.venv` has the package; elsewhere: make client, pip install build/dist/switchgear_client-*.whl
The frontend's gRPC port is what `make up` prints, and in `make status`. SWITCHGEAR_API_KEY is sent
if it is set.
"""

import argparse
import asyncio
import os
import sys

import grpc

from switchgear_client import Client, reason_of


async def main() -> int:
    arguments = argparse.ArgumentParser(description="Streams an answer over gRPC.")
    arguments.add_argument("address", help="host:port of a frontend's gRPC API")
    arguments.add_argument("question")
    arguments.add_argument("--model", default="", help="default: the first one that is served")
    arguments.add_argument("--max-tokens", type=int, default=64)
    options = arguments.parse_args()
    api_key = os.environ.get("SWITCHGEAR_API_KEY", "")
    async with Client(options.address, api_key=api_key, deadline_seconds=60) as client:
        try:
            model = options.model or (await client.models())[0].model
            messages = [("user", options.question)]
            async for piece in client.stream(model, messages, max_tokens=options.max_tokens):
                print(piece, end="", flush=True)
        except grpc.aio.AioRpcError as error:
            print(f"{reason_of(error) or error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    print()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
