"""Where the repository differs from what follows from its imports."""

from __future__ import annotations

from pathlib import Path

from deploy.delivery import build_files, targets, workflows


def outdated(root: Path) -> dict[Path, str | None]:
    """What must be written to each file, or None for one that must go. Empty when all agrees.

    Raises as `targets.read`.
    """
    graph = targets.read(root)
    found = build_files.written(root) | workflows.written(root)
    expected = build_files.build_files(root, graph) | workflows.workflows(root, graph)
    changes: dict[Path, str | None] = {
        path: text for path, text in expected.items() if found.get(path) != text
    }
    return changes | dict.fromkeys(found.keys() - expected.keys())
