"""BUILD files, from the imports.

What Bazel then refuses: a service that imports another, since services are visible to themselves,
tests and tools only; and a core that imports an adapter, since the adapter needs the core already.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy.delivery import imports
from deploy.delivery.targets import SERVICE, Graph, Target

HEADER = "# Written from the imports by `make build-files`; changes by hand are lost.\n"

SERVER_FIXTURES = Path("tests/fixtures/servers.py")

HOST_FOLDERS = ("tests/deploy", "tests/e2e", "tests/services/frontend/sdks")
"""Their tests need the machine and not just what they import: processes, the whole repository,
packages of other languages."""

_PYTHON_RULES = "@rules_python//python:defs.bzl"


def build_files(root: Path, graph: Graph) -> dict[Path, str]:
    """The text of each BUILD file that the repository should have, besides those kept by hand."""
    folders: dict[Path, list[Target]] = {}
    for target in sorted(graph.files):
        folders.setdefault(target.folder, []).append(target)
    hosted = _HostTests(root, graph)
    texts = {}
    for folder, targets in folders.items():
        match folder.parts[0]:
            case imports.PROTO_FOLDER:
                parts = _contracts(root, targets[0], graph)
            case "tests":
                parts = _tests(targets, graph, hosted)
            case _:
                parts = _library(targets[0], graph)
        texts[folder / "BUILD"] = f"{HEADER}\n" + "\n".join(parts)
    return texts


def written(root: Path) -> dict[Path, str]:
    """The text of each BUILD file in the repository that was written from imports."""
    tops = (*imports.PYTHON_FOLDERS, imports.PROTO_FOLDER)
    found = [path for top in tops for path in (root / top).rglob("BUILD")]
    texts = {path.relative_to(root): path.read_text() for path in found if path.is_file()}
    return {path: text for path, text in texts.items() if text.startswith(HEADER)}


class _HostTests:
    """Which tests need more of the machine than what they import."""

    def __init__(self, root: Path, graph: Graph) -> None:
        self._root = root
        self._graph = graph
        servers = ast.parse((root / SERVER_FIXTURES).read_bytes())
        self._fixtures = {
            node.name
            for node in servers.body
            if isinstance(node, ast.FunctionDef) and node.decorator_list
        }

    def __contains__(self, test: Target) -> bool:
        if test.folder.as_posix().startswith(HOST_FOLDERS):
            return True
        files = set(self._graph.files[test])
        if any(b"pytest.mark.vllm" in (self._root / file).read_bytes() for file in files):
            return True  # It runs vLLM's own environment.
        for target in self._graph.closure(test):
            # Who defines the fixtures may ask for one to make another; that starts nothing yet.
            if target.folder.parts[0] == "tests" and target.folder != SERVER_FIXTURES.parent:
                files |= self._graph.files[target]
        return any(self._parameters(file) & self._fixtures for file in files)

    def _parameters(self, file: Path) -> set[str]:
        tree = ast.parse((self._root / file).read_bytes())
        return {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


def _contracts(root: Path, target: Target, graph: Graph) -> Iterator[str]:
    sources = sorted(path.name for path in (root / target.folder).glob("*.proto"))
    yield 'load("//deploy/bazel:protos.bzl", "python_protos")\n'
    yield 'package(default_visibility = ["//visibility:public"])\n'
    yield _rule(
        "python_protos",
        name=_quoted(target.name),
        srcs=_listed(sources),
        deps=_dependencies(target, graph),
    )


def _library(target: Target, graph: Graph) -> Iterator[str]:
    has_program = target.folder / "__main__.py" in graph.files[target]
    rules = '"py_binary", "py_library"' if has_program else '"py_library"'
    yield f'load("{_PYTHON_RULES}", {rules})\n'
    yield f"package(default_visibility = {_listed(_visibility(target), indent=0)})\n"
    yield _rule(
        "py_library",
        name=_quoted(target.name),
        srcs='glob(["**/*.py"])',
        imports=_listed(["."] if target.folder in imports.SOURCE_ROOTS else []),
        deps=_dependencies(target, graph),
    )
    if has_program:
        yield _rule(
            "py_binary",
            name=_quoted(target.folder.name if target.name == SERVICE else "main"),
            srcs='["__main__.py"]',
            legacy_create_init="0",
            main='"__main__.py"',
            deps=_listed([f":{target.name}"]),
        )


def _visibility(target: Target) -> list[str]:
    """Services meet in protos alone: nobody but tests and tools sees inside of one."""
    match target.folder.parts:
        case ("clients" | "libs", *_):
            return ["//visibility:public"]
        case ("services", name, *_):
            seeing = ["benchmarks", "deploy", f"services/{name}", "tests"]
        case _:
            seeing = ["benchmarks", "deploy", "tests"]
    return [f"//{folder}:__subpackages__" for folder in seeing]


def _tests(targets: Sequence[Target], graph: Graph, hosted: _HostTests) -> Iterator[str]:
    tests = [target for target in targets if target.is_test]
    if len(tests) < len(targets):
        yield f'load("{_PYTHON_RULES}", "py_library")'
    if tests:
        yield 'load("//deploy/bazel:pytest.bzl", "pytest_test")'
    yield ""
    for target in targets:
        if target.is_test:
            yield _rule(
                "pytest_test",
                name=_quoted(target.name),
                tags=_listed(["host"] if target in hosted else []),
                deps=_dependencies(target, graph),
            )
        else:
            yield _rule(
                "py_library",
                name=_quoted(target.name),
                testonly="True",
                srcs=_listed(sorted(file.name for file in graph.files[target])),
                visibility=_listed(["//tests:__subpackages__"]),
                deps=_dependencies(target, graph),
            )


def _dependencies(target: Target, graph: Graph) -> str:
    return _listed([needed.label for needed in sorted(graph.needs[target])])


def _rule(rule: str, **attributes: str) -> str:
    """A call of a rule; attributes that are empty lists are left out."""
    lines = (f"    {name} = {value},\n" for name, value in attributes.items() if value != "[]")
    return f"{rule}(\n{''.join(lines)})\n"


def _quoted(text: str) -> str:
    return f'"{text}"'


def _listed(items: Sequence[str], indent: int = 4) -> str:
    if len(items) < 2:
        return f"[{''.join(map(_quoted, items))}]"
    space = " " * indent
    return "[\n" + "".join(f"{space}    {_quoted(item)},\n" for item in items) + f"{space}]"
