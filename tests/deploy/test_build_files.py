"""BUILD files and workflows agree with the imports, here and in a small made-up repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.delivery import build_files, targets
from deploy.delivery.__main__ import ROOT
from deploy.delivery.outdated import outdated
from deploy.delivery.targets import CyclicTargets, NotInAnyLibrary

Write = Callable[[str, str], None]

PROGRAM = """
from services.front.core.plan import plan
from switchgear.back.v1 import back_pb2
"""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("tests/fixtures/servers.py", "@fixture\ndef etcd_server(): ...\n")
    write("protos/switchgear/common/v1/common.proto", "")
    write("protos/switchgear/back/v1/back.proto", 'import "switchgear/common/v1/common.proto";\n')
    write("services/__init__.py", '"""What runs."""')
    write("services/front/__main__.py", PROGRAM)
    write("services/front/core/plan.py", "plan = 1\n")
    write("services/back/__main__.py", "")
    return write


def bring_up_to_date(root: Path) -> dict[Path, str | None]:
    changes = outdated(root)
    for path, text in changes.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            (root / path).unlink()
        else:
            (root / path).write_text(text)
    assert outdated(root) == {}
    return changes


def test_the_repository_is_up_to_date() -> None:
    differing = ", ".join(map(str, sorted(outdated(ROOT))))
    assert not differing, f"run `make build-files`, these differ from the imports: {differing}"


def test_every_python_file_of_the_repository_is_in_one_target() -> None:
    graph = targets.read(ROOT)
    owned = [file for files in graph.files.values() for file in files]
    assert len(owned) == len(set(owned))
    assert {Path("services/router/main.py"), Path("libs/common/errors.py")} <= set(owned)


def test_a_new_import_changes_its_own_build_file_and_the_workflow(
    tmp_path: Path, write: Write
) -> None:
    write("libs/common/clock.py", "")
    bring_up_to_date(tmp_path)
    write("services/front/core/plan.py", "from libs.common import clock\n")
    changes = bring_up_to_date(tmp_path)
    assert set(map(str, changes)) == {
        "services/front/core/BUILD",
        ".github/workflows/front.yml",
    }
    assert '"//libs/common"' in (tmp_path / "services/front/core/BUILD").read_text()
    assert '"libs/common/**"' in (tmp_path / ".github/workflows/front.yml").read_text()
    assert "libs/common" not in (tmp_path / ".github/workflows/back.yml").read_text()


def test_a_workflow_runs_for_contracts_that_contracts_import(tmp_path: Path, write: Write) -> None:
    bring_up_to_date(tmp_path)
    text = (tmp_path / ".github/workflows/front.yml").read_text()
    assert '"protos/switchgear/back/v1/**"' in text
    assert '"protos/switchgear/common/v1/**"' in text
    assert '"services/back/**"' not in text


def test_modules_of_another_source_root_are_found(tmp_path: Path, write: Write) -> None:
    write("clients/python/switchgear_client/__init__.py", "class Client: ...\n")
    write("tests/clients/test_it.py", "from switchgear_client import Client\n")
    bring_up_to_date(tmp_path)
    assert '"//clients/python"' in (tmp_path / "tests/clients/BUILD").read_text()
    assert 'imports = ["."]' in (tmp_path / "clients/python/BUILD").read_text()


def test_what_has_no_sources_any_more_is_removed(tmp_path: Path, write: Write) -> None:
    bring_up_to_date(tmp_path)
    (tmp_path / "services/back/__main__.py").unlink()
    changes = bring_up_to_date(tmp_path)
    assert changes == {
        Path("services/back/BUILD"): None,
        Path(".github/workflows/back.yml"): None,
    }


def test_build_files_kept_by_hand_are_left_alone(tmp_path: Path, write: Write) -> None:
    write("deploy/bazel/BUILD", "# mine")
    bring_up_to_date(tmp_path)
    assert (tmp_path / "deploy/bazel/BUILD").read_text() == "# mine"


def test_a_core_that_imports_its_adapters_is_refused(tmp_path: Path, write: Write) -> None:
    write("services/front/core/plan.py", "import services.front.__main__\n")
    with pytest.raises(CyclicTargets, match="//services/front/core"):
        outdated(tmp_path)


def test_code_outside_of_all_libraries_is_refused(tmp_path: Path, write: Write) -> None:
    write("services/shared.py", "shared = 1\n")
    with pytest.raises(NotInAnyLibrary, match=r"services/shared\.py"):
        outdated(tmp_path)


def test_a_service_is_seen_by_itself_tests_and_tools_alone(tmp_path: Path, write: Write) -> None:
    bring_up_to_date(tmp_path)
    for name in ("services/front/BUILD", "services/front/core/BUILD"):
        text = (tmp_path / name).read_text()
        visibility = text[text.index("default_visibility") : text.index("])")]
        assert "//services/front:__subpackages__" in visibility
        assert "back" not in visibility
        assert "public" not in visibility


@pytest.mark.parametrize(
    ("test", "is_hosted"),
    [
        ("def test_it(etcd_server): ...\n", True),
        ("def test_it(other): ...\n", False),
        ("import tests.services.front.fakes\ndef test_it(fake): ...\n", True),
    ],
)
def test_tests_that_need_a_server_are_tagged(
    tmp_path: Path, write: Write, test: str, is_hosted: bool
) -> None:
    write("tests/services/front/fakes.py", "def fake(etcd_server): ...\n")
    write("tests/services/front/test_it.py", test)
    bring_up_to_date(tmp_path)
    text = (tmp_path / "tests/services/front/BUILD").read_text()
    assert ('tags = ["host"]' in text) is is_hosted


def test_tests_see_the_conftest_files_above_them(tmp_path: Path, write: Write) -> None:
    write("tests/conftest.py", "")
    write("tests/services/front/test_it.py", "")
    files = build_files.build_files(tmp_path, targets.read(tmp_path))
    assert '"//tests:support"' in files[Path("tests/services/front/BUILD")]
