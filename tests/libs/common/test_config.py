from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from libs.common.config import ConfigError, ServiceSettings, exit_on_bad_settings, load


class ExampleSettings(ServiceSettings):
    """An example."""

    model_config = SettingsConfigDict(env_prefix="SWITCHGEAR_EXAMPLE_")

    weight: float = Field(default=1.0, ge=0)
    """What it weighs."""


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ExampleSettings]:
    def read(*argv: str, **environ: str) -> ExampleSettings:
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return load(ExampleSettings, argv, environ, "example")

    return read


Read = Callable[..., ExampleSettings]


def test_flags_win_over_the_environment_and_that_over_defaults(read: Read) -> None:
    assert read().weight == 1.0
    environ = {"SWITCHGEAR_EXAMPLE_WEIGHT": "2", "SWITCHGEAR_EXAMPLE_NAME": "x-1"}
    assert read(**environ).weight == 2.0
    settings = read("--weight", "3", **environ)
    assert (settings.weight, settings.name) == (3.0, "x-1")


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        (("--weight", "-1"), {}, ("--weight", "'-1'")),
        (("--weight", "heavy"), {}, ("--weight", "'heavy'")),
        (("--grpc-port", "70000"), {}, ("--grpc-port", "'70000'")),
        (("--etcd-url", "localhost"), {}, ("--etcd-url", "'localhost'")),
        ((), {"SWITCHGEAR_EXAMPLE_WEIGHT": "-2"}, ("SWITCHGEAR_EXAMPLE_WEIGHT", "'-2'")),
        ((), {"SWITCHGEAR_EXAMPLE_WIEGHT": "2"}, ("SWITCHGEAR_EXAMPLE_WIEGHT", "'2'")),
        (("--host", "0.0.0.0"), {}, ("advertise_host", "0.0.0.0")),
    ],
)
def test_a_bad_setting_is_named_with_its_value(
    read: Read, argv: tuple[str, ...], environ: dict[str, str], named: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*argv, **environ)
    assert all(part in str(caught.value) for part in named)


def test_an_unknown_flag_ends_the_process(read: Read, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--wieght", "3")
    assert caught.value.code == 2
    assert "--wieght" in capsys.readouterr().err


def test_a_bad_setting_ends_the_process_with_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        exit_on_bad_settings(ExampleSettings, ["--weight", "-1"], {}, "example")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("example: --weight (SWITCHGEAR_EXAMPLE_WEIGHT)")


def test_variables_of_others_are_not_ours(read: Read) -> None:
    assert read(EXAMPLE_WEIGHT="9", SWITCHGEAR_OTHER_WEIGHT="9").weight == 1.0


def test_help_shows_what_each_setting_is_for(
    read: Read, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out
    assert "An example." in text
    assert "What it weighs." in text
