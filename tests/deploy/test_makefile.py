"""What `make` makes of its settings."""

import os
import subprocess

import pytest

from deploy.local.topology import REPOSITORY

SWITCHES = {"ENVOY": "--envoy", "TLS": "--tls", "DETACH": "--detach"}


def make(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return subprocess.run(
        ["make", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_is_off_when_it_is_empty_or_0(switch: str) -> None:
    for value, is_on in (("", False), ("0", False), ("1", True)):
        planned = make("--dry-run", "up", "ENGINE=sim", f"{switch}={value}").stdout
        assert (SWITCHES[switch] in planned) == is_on, value


def test_a_restart_of_nothing_says_what_to_name() -> None:
    refused = make("restart")
    assert refused.returncode != 0
    assert "make restart SERVICE=router-0" in refused.stderr
