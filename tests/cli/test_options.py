"""Records of options: what a command that takes one is given."""

from importlib import import_module
from typing import Any

import pytest
import typer
from typer.main import get_command_from_info
from typer.testing import CliRunner

from moefit.cli import app as cli
from moefit.cli.app import ADVANCED, COMMANDS
from moefit.cli.options import MISS_OPTIONS, MemoryOptions, MissOptions, ModeName, expand_options
from moefit.errors import ConfigError
from moefit.serve.config import Policy


def given_by(*options: str) -> dict:
    """What a command of two records and a parameter of its own gets."""
    app, got = typer.Typer(), {}

    short = MemoryOptions(context=64)

    @app.command()
    @expand_options
    def one(
        model: str, room: MemoryOptions = short, port: int = 1, misses: MissOptions = MISS_OPTIONS
    ):
        got.update(model=model, room=room, port=port, misses=misses)

    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    return got


def test_nothing_given_is_what_the_commands_default_says() -> None:
    assert given_by("a") == {
        "model": "a",
        "room": MemoryOptions(context=64),
        "port": 1,
        "misses": MISS_OPTIONS,
    }
    assert not MemoryOptions(context=64).wanted and not MISS_OPTIONS.wanted
    assert MISS_OPTIONS.settings() == {"mode": "exact"}
    assert MissOptions(bound=0.2).settings() == {"mode": "exact", "bound": 0.2}
    assert MissOptions(bound=0.2).wanted


def test_each_field_is_an_option() -> None:
    options = "--memory 3GiB --precision int4 --context 5 --dtype bfloat16 --prefill exact"
    got = given_by("a", "--port", "7", "--mode", "virtual", *options.split())
    assert (got["port"], got["misses"].mode) == (7, ModeName.virtual)
    assert got["misses"].settings() == {
        **MISS_OPTIONS.settings(),
        "mode": "virtual",
        "prefill": "exact",
    }
    room = got["room"]
    assert (room.memory, room.precision, room.context) == ("3GiB", "int4", 5)
    assert room.wanted and str(room.settings()["dtype"]) == "torch.bfloat16"


@pytest.mark.parametrize("vain", [["--bound", "0.5"], ["--bound", "0.5", "--mode", "virtual"]])
@pytest.mark.parametrize("command", [["generate", "reference", "a"], ["chat", "reference"]])
def test_a_bound_that_nothing_goes_by_is_refused(command: list[str], vain: list[str]) -> None:
    done = CliRunner().invoke(cli, [*command, *vain])
    assert isinstance(done.exception, ConfigError)
    assert "--bound 0.5 is for the mode bounded" in str(done.exception)


def test_each_option_alone_is_something_that_is_asked_for() -> None:
    for one in (
        MissOptions(mode=ModeName.exact),
        MissOptions(prefill=ModeName.virtual),
        MissOptions(bound=0.1),
    ):
        assert one.wanted
    for one in (
        MissOptions(mode=ModeName.bounded, bound=0.1),
        MissOptions(prefill=ModeName.bounded, bound=0),
    ):
        one.refuse_vain()


def test_an_options_own_limits_hold() -> None:
    app = typer.Typer()

    @app.command()
    @expand_options
    def one(misses: MissOptions = MISS_OPTIONS):
        raise AssertionError("not reached")

    refused = CliRunner().invoke(app, ["--bound", "2"])
    assert refused.exit_code == 2 and "--bound" in refused.output
    help = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert "--prefill" in help and f"{Policy().bound} if not" in help


def shown(group: Any, name: str) -> list[Any]:
    """The options of a command that stand outside the panel "Advanced", with --help."""
    made = next(one for one in group.registered_commands if one.name == name)
    options = [
        one
        for one in get_command_from_info(
            made, pretty_exceptions_short=False, rich_markup_mode="rich"
        ).params
        if one.param_type_name == "option" and not one.hidden
    ]
    assert all(one.help for one in options), name
    return ["--help", *(one for one in options if one.rich_help_panel != ADVANCED)]


def test_help_shows_at_most_ten_options_and_the_others_under_advanced() -> None:
    for name, (module, _) in COMMANDS.items():
        loaded = import_module(f"moefit.cli.{module}")
        if name == "budget":
            assert len(shown(loaded.budget, "set")) <= 10
        else:
            assert len(shown(cli, name)) <= 10, name
    served = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "200"}).output
    main, advanced = served.split("Advanced")
    assert "--memory" in main and "--exact" in main and "--dense-precision" not in main
    assert "--dense-precision" in advanced and "--rest" not in served
