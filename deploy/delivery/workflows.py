"""Each service's GitHub Actions workflow, run for what its imports reach and for nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from deploy.delivery.targets import SERVICE, Graph

HEADER = "# Written from the imports by `make build-files`; changes by hand are lost.\n"

FOLDER = Path(".github/workflows")

_ALL_SERVICES = (
    ".github/workflows/service.yml",
    "deploy/helm/switchgear/*.yaml",
    "deploy/helm/switchgear/templates/**",
    "deploy/images/**",
    "requirements/**",
)
"""What is in every image or every delivery, whatever is imported."""

_TEXT = """\
name: {service}

on:
  pull_request:
    paths:
{paths}
  push:
    branches: [main]
    paths:
{paths}

jobs:
  {service}:
    uses: ./.github/workflows/service.yml
    with:
      service: {service}
      tests: {tests}
    secrets: inherit
"""


def workflows(root: Path, graph: Graph) -> dict[Path, str]:
    """The text of each service's workflow."""
    texts = {}
    for target in graph.files:
        if target.name == SERVICE:
            service = target.folder.name
            folders = _outermost(needed.folder for needed in graph.closure(target))
            mirrors = [
                f"tests/{folder}" for folder in folders if (root / "tests" / folder).is_dir()
            ]
            paths = _paths(service, [*folders, *mirrors])
            text = _TEXT.format(service=service, paths=paths, tests=" ".join(mirrors))
            texts[FOLDER / f"{service}.yml"] = HEADER + text
    return texts


def written(root: Path) -> dict[Path, str]:
    """The text of each workflow in the repository that was written from imports."""
    texts = {path.relative_to(root): path.read_text() for path in (root / FOLDER).glob("*.yml")}
    return {path: text for path, text in texts.items() if text.startswith(HEADER)}


def _outermost(folders: Iterable[Path]) -> list[str]:
    """The folders that lie in no other one of them."""
    unique = set(folders)
    return sorted(folder.as_posix() for folder in unique if unique.isdisjoint(folder.parents))


def _paths(service: str, folders: Sequence[str]) -> str:
    own = (f".github/workflows/{service}.yml", f"deploy/helm/switchgear/values/{service}.yaml")
    paths = sorted((*_ALL_SERVICES, *own, *(f"{folder}/**" for folder in folders)))
    return "\n".join(f'      - "{path}"' for path in paths)
