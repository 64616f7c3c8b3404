"""Bazel's targets and what they need, from the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deploy.delivery import imports

LIBRARIES = (
    "benchmarks/*",
    "clients/*",
    "deploy/*",
    "libs/*",
    "libs/engine/*",
    "libs/*/core",
    "libs/*/*/core",
    "protos/switchgear/*/*",
    "services/*",
    "services/*/core",
)
"""Folders that are one library each, with all below them that is not a library itself."""

SERVICE = "service"
"""The library of a service; the service's own name is the program's."""

SUPPORT = "support"
"""What the tests of a folder share: conftest.py, fakes, samples."""


class NotInAnyLibrary(Exception):
    """A file with code lies outside of the folders that are libraries. The text names it."""


class CyclicTargets(Exception):
    """Two libraries need each other, such as a core its adapters. The text names both."""


@dataclass(frozen=True, slots=True, order=True)
class Target:
    folder: Path
    name: str

    @property
    def label(self) -> str:
        short = f"//{self.folder.as_posix()}"
        return short if self.name == self.folder.name else f"{short}:{self.name}"

    @property
    def is_test(self) -> bool:
        return self.folder.parts[0] == "tests" and self.name != SUPPORT


@dataclass(frozen=True, slots=True)
class Graph:
    files: Mapping[Target, frozenset[Path]]
    needs: Mapping[Target, frozenset[Target]]
    """What each target imports directly, and for tests the conftest.py files above them."""

    def closure(self, start: Target) -> set[Target]:
        """All that a target needs, and itself."""
        reached: set[Target] = set()
        waiting = [start]
        while waiting:
            target = waiting.pop()
            if target not in reached:
                reached.add(target)
                waiting.extend(self.needs[target])
        return reached


def read(root: Path) -> Graph:
    """The targets of a repository. Raises NotInAnyLibrary and CyclicTargets."""
    imported = imports.read(root)
    owners = {file: target for file in imported if (target := _owner(file)) is not None}
    for file in imported.keys() - owners.keys():
        if _has_code(root / file):
            raise NotInAnyLibrary(f"{file}: none of {', '.join(LIBRARIES)} covers it")
    files: dict[Target, set[Path]] = {}
    for file, target in owners.items():
        files.setdefault(target, set()).add(file)
    graph = Graph(
        {target: frozenset(its) for target, its in files.items()},
        {target: _needs(target, its, imported, owners) for target, its in files.items()},
    )
    for target, direct in graph.needs.items():
        for other in direct:
            if target in graph.closure(other):
                raise CyclicTargets(f"{target.label} and {other.label} need each other")
    return graph


def _owner(file: Path) -> Target | None:
    if file.parts[0] == "tests":
        return Target(file.parent, file.stem if file.name.startswith("test_") else SUPPORT)
    # A package of contracts is its folder. The innermost library counts.
    for folder in file.parents if file.suffix else (file, *file.parents):
        if any(_is(folder, pattern) for pattern in LIBRARIES):
            return Target(folder, SERVICE if _is(folder, "services/*") else folder.name)
    return None


def _is(folder: Path, pattern: str) -> bool:
    return len(folder.parts) == pattern.count("/") + 1 and folder.match(pattern)


def _has_code(file: Path) -> bool:
    body = ast.parse(file.read_bytes()).body
    return not all(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body
    )


def _needs(
    target: Target,
    files: Iterable[Path],
    imported: imports.Imports,
    owners: Mapping[Path, Target],
) -> frozenset[Target]:
    needed = {other for file in files for other in imported[file]}
    if target.is_test:
        above = (folder / "conftest.py" for folder in (target.folder, *target.folder.parents))
        needed |= {conftest for conftest in above if conftest in owners}
    return frozenset(owners[file] for file in needed if file in owners) - {target}
