"""python -m deploy.delivery: writes what follows from the imports, and says what changed."""

from __future__ import annotations

from pathlib import Path

from deploy.delivery.outdated import outdated

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    for path, text in sorted(outdated(ROOT).items()):
        if text is None:
            (ROOT / path).unlink()
            print(f"removed {path}")
        else:
            (ROOT / path).write_text(text)
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
