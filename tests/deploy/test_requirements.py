"""The lock files fit each other, and fit any machine."""

import re
from pathlib import Path

import pytest

from deploy.local.topology import REPOSITORY

LOCKS = sorted((REPOSITORY / "requirements").glob("*.txt"))
# Other systems' environments run nothing of ours.
OUR_LOCKS = [lock for lock in LOCKS if lock.stem not in ("dynamo", "smg")]


def versions(lock: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", lock.read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("lock", OUR_LOCKS, ids=lambda lock: lock.stem)
def test_a_package_of_the_services_has_one_version_everywhere(lock: Path) -> None:
    services = versions(REPOSITORY / "requirements" / "services.txt")
    here = versions(lock)
    assert {name: here[name] for name in services.keys() & here.keys()} == {
        name: services[name] for name in services.keys() & here.keys()
    }


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_names_no_host(lock: Path) -> None:
    assert "://" not in lock.read_text()


def test_the_services_need_no_torch() -> None:
    assert "torch" not in versions(REPOSITORY / "requirements" / "dev.txt")
