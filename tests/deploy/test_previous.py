"""Which version comes before this one, and that its files can be had."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from deploy.delivery.previous import NAMED, NoPreviousVersion, files_of, previous_commit

SCRIPT = "#!/bin/sh\nmkdir -p build/proto && .venv/bin/python -c 'print(1)' > build/proto/made\n"


def git(repository: Path, *arguments: str) -> str:
    who = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.com")
    done = subprocess.run(
        ["git", *who, *arguments], cwd=repository, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With one commit."""
    folder = tmp_path / "origin"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder, "scripts/proto.sh", SCRIPT)
    return folder


def commit(repository: Path, path: str, text: str) -> str:
    file = repository / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    git(repository, "add", path)
    git(repository, "commit", "--quiet", "--message", path)
    return git(repository, "rev-parse", "HEAD")


def test_the_named_commit_counts_while_nothing_is_released(repository: Path) -> None:
    first = git(repository, "rev-parse", "HEAD")
    commit(repository, str(NAMED), f"{first}\n")
    assert previous_commit(repository) == first


def test_the_latest_release_before_the_commit_counts(repository: Path) -> None:
    commit(repository, str(NAMED), git(repository, "rev-parse", "HEAD"))
    git(repository, "tag", "v1.9")
    git(repository, "switch", "--quiet", "--create", "other")
    commit(repository, "elsewhere", "")
    git(repository, "tag", "v3.0")
    git(repository, "switch", "--quiet", "main")
    expected = commit(repository, "later", "")
    # Also by an annotated tag, which is an object of its own.
    git(repository, "tag", "v1.10", "--message", "a release")
    git(repository, "tag", "vocabulary")
    commit(repository, "latest", "")
    # The release itself comes after the one before it.
    git(repository, "tag", "v2.0")
    assert previous_commit(repository) == expected


def test_a_shallow_clone_is_given_its_history(repository: Path, tmp_path: Path) -> None:
    expected = git(repository, "rev-parse", "HEAD")
    git(repository, "tag", "v1.0")
    commit(repository, "later", "")
    commit(repository, "latest", "")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--depth=1", "--no-tags", f"file://{repository}", str(clone))
    assert git(clone, "tag") == ""
    assert previous_commit(clone) == expected


def test_history_that_is_nowhere_is_an_error_that_says_so(repository: Path, tmp_path: Path) -> None:
    commit(repository, "later", "")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{repository}", str(clone))
    git(clone, "remote", "set-url", "origin", str(tmp_path / "gone"))
    with pytest.raises(NoPreviousVersion, match=r"git fetch .*gone.* does not"):
        previous_commit(clone)


def test_a_commit_that_is_not_there_is_named(repository: Path) -> None:
    commit(repository, str(NAMED), "0123456789abcdef0123456789abcdef01234567")
    with pytest.raises(NoPreviousVersion, match="0123456789abcdef0123456789abcdef01234567"):
        previous_commit(repository)


def test_no_release_and_no_name_is_an_error(repository: Path) -> None:
    with pytest.raises(NoPreviousVersion, match="previous_version"):
        previous_commit(repository)


def test_no_repository_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NoPreviousVersion, match="not a git repository"):
        previous_commit(tmp_path)


def test_files_are_as_committed_with_contracts_generated_once(
    repository: Path, tmp_path: Path
) -> None:
    first = git(repository, "rev-parse", "HEAD")
    commit(repository, "scripts/proto.sh", "#!/bin/sh\nexit 1\n")
    folder = files_of(repository, first, tmp_path / "cache")
    assert (folder / "scripts/proto.sh").read_text() == SCRIPT
    assert (folder / "build/proto/made").read_text() == "1\n"
    (folder / "build/proto/made").write_text("still here")
    assert files_of(repository, first, tmp_path / "cache") == folder
    assert (folder / "build/proto/made").read_text() == "still here"


def test_nothing_is_kept_of_files_that_could_not_be_made(repository: Path, tmp_path: Path) -> None:
    broken = commit(repository, "scripts/proto.sh", "#!/bin/sh\necho wrong >&2; exit 1\n")
    with pytest.raises(NoPreviousVersion, match=r"scripts/proto.sh.* failed: wrong"):
        files_of(repository, broken, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
