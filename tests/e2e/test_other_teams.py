"""Other teams, with keys of their own: by HTTP, by the wheel, and by buf."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.local.topology import REPOSITORY
from services.frontend.core.api_keys import digest_of, new_key
from tests.e2e.running import LONG_PROMPT, Running, running

KEY, RIVAL_KEY = new_key(b"k" * 32), new_key(b"r" * 32)
COMMAND_SECONDS = 110


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path
) -> Iterator[Running]:
    keys = tmp_path_factory.mktemp("access") / "keys.json"
    stored = [
        {"key_id": name, "key_sha256": digest_of(key).hex(), "tenant": name}
        for name, key in (("team", KEY), ("rival", RIVAL_KEY))
    ]
    keys.write_text(json.dumps({"keys": stored}))
    with running(
        tmp_path_factory.mktemp("run"),
        engine="sim",
        model=tokenizer_folder,
        flags={"frontend": ("--api-keys", str(keys))},
        prefill=0,
    ) as it:
        yield it


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of a fresh environment that has the wheel and nothing of ours besides."""
    wheel = command([str(REPOSITORY / "scripts" / "client.sh")]).stdout.strip()
    folder = tmp_path_factory.mktemp("environment")
    command([sys.executable, "-m", "venv", str(folder)])
    python = str(folder / "bin" / "python")
    command([python, "-m", "pip", "install", "--quiet", wheel])
    return python


def command(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        arguments,
        capture_output=True,
        cwd=REPOSITORY,
        env=clean | environment,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )


def address(deployment: Running) -> str:
    return f"127.0.0.1:{deployment.cluster.process('frontend-0').spec.ports['grpc']}"


def test_a_tenant_finds_its_own_cached_prompts_and_nobody_elses(deployment: Running) -> None:
    body = {"model": deployment.model, "prompt": LONG_PROMPT, "max_tokens": 2}
    cached = []
    for key in (KEY, KEY, RIVAL_KEY):
        answer = httpx.post(
            f"{deployment.url}/v1/completions",
            json=body,
            headers={"authorization": f"Bearer {key}"},
            timeout=60,
        )
        assert answer.status_code == 200, answer.text
        cached.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
    first, again, rival = cached
    assert first == rival == 0
    assert again > 500


@pytest.mark.timeout(300)
def test_the_wheel_streams_from_an_environment_of_its_own(deployment: Running, python: str) -> None:
    example = [python, "-I", "examples/python_client.py", address(deployment), "Hello"]
    answered = command([*example, "--max-tokens", "8"], SWITCHGEAR_API_KEY=KEY)
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
    refused = command(example, SWITCHGEAR_API_KEY="wrong")
    assert refused.returncode == 1
    assert refused.stderr.startswith("UNAUTHENTICATED: ")


@pytest.mark.timeout(300)
def test_the_wheel_brings_types(python: str, tmp_path: Path) -> None:
    using = tmp_path / "using.py"
    using.write_text(
        "from switchgear_client import Client\n"
        "async def use(client: Client) -> int:\n"
        "    reveal_type((await client.models())[0].model)\n"
        "    return (await client.complete('m', 'a')).usage.prompt_tokens\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull]
    checked = command([*mypy, "--python-executable", python, str(using)])
    assert checked.returncode == 0, checked.stdout
    assert 'Revealed type is "str"' in checked.stdout.replace("builtins.", "")


def test_buf_streams_through_reflection(deployment: Running) -> None:
    script = [str(REPOSITORY / "examples" / "grpc" / "generate.sh"), address(deployment)]
    answered = command([*script, deployment.model, 'Say "hi"\\', "6"], SWITCHGEAR_API_KEY=KEY)
    assert answered.returncode == 0, answered.stderr
    decoder = json.JSONDecoder()
    messages, rest = [], answered.stdout.strip()
    while rest:
        message, end = decoder.raw_decode(rest)
        messages.append(message)
        rest = rest[end:].strip()
    assert "".join(message.get("text", "") for message in messages)
    assert messages[-1]["usage"]["completionTokens"] == 6
    assert "UNAUTHENTICATED" in command([*script, deployment.model, "Hi"]).stderr.upper()
