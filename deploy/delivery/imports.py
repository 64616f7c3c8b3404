"""Which files of the repository each file imports, read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

PYTHON_FOLDERS = ("benchmarks", "clients", "deploy", "libs", "services", "tests")
PROTO_FOLDER = "protos"

SOURCE_ROOTS = (Path("clients/python"),)
"""Folders besides the repository's own root that names of modules start from."""

# Started by path and never imported; its BUILD file is kept by hand.
_BY_HAND = "deploy/bazel/"

_PROTO_IMPORT = re.compile(r'^import (?:public )?"([^"]+)";', re.MULTILINE)

Imports = Mapping[Path, frozenset[Path]]
"""For each file those that it imports, all as paths from the repository's root.

A package of contracts is its folder: what is imported is generated from all of it."""


def read(root: Path) -> Imports:
    """The imports of all Python files and packages of contracts."""
    modules = _modules(root)
    found = {
        file: frozenset(_imported(ast.parse((root / file).read_bytes(), file), modules) - {file})
        for file in modules.values()
        if file.suffix == ".py"
    }
    for folder in _proto_folders(root):
        text = "".join(file.read_text() for file in (root / folder).glob("*.proto"))
        named = {(Path(PROTO_FOLDER) / name).parent for name in _PROTO_IMPORT.findall(text)}
        # What is not ours, google/protobuf and google/rpc, comes with packages.
        found[folder] = frozenset(name for name in named if (root / name).is_dir()) - {folder}
    return found


def _modules(root: Path) -> dict[str, Path]:
    """Each module's file, and each package of contracts' folder, by its dotted name."""
    modules = {}
    for top in PYTHON_FOLDERS:
        for path in (root / top).rglob("*.py"):
            file = path.relative_to(root)
            if not file.as_posix().startswith(_BY_HAND):
                named = file.parent if file.name == "__init__.py" else file.with_suffix("")
                start = next((root for root in SOURCE_ROOTS if root in file.parents), Path())
                modules[".".join(named.relative_to(start).parts)] = file
    for folder in _proto_folders(root):
        modules[".".join(folder.parts[1:])] = folder
    return modules


def _proto_folders(root: Path) -> set[Path]:
    return {file.parent.relative_to(root) for file in (root / PROTO_FOLDER).rglob("*.proto")}


def _imported(tree: ast.Module, modules: Mapping[str, Path]) -> set[Path]:
    return {modules[name] for name in _names(tree) if name in modules}


def _names(tree: ast.Module) -> Iterator[str]:
    """Dotted names that may be modules; `from a import b` may mean a.b, or b in a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
