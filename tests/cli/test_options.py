"""Records of options and their values in a command."""

from importlib import import_module
from typing import Any

import pytest
import typer
from typer.main import get_command_from_info
from typer.testing import CliRunner

from moefit.cli import app as cli
from moefit.cli.app import ADVANCED, COMMANDS, ModeName
from moefit.cli.options import (
    HostCompute,
    MemoryOptions,
    SamplingOptions,
    ServingOptions,
    expand_options,
)
from moefit.errors import ConfigError
from moefit.serve.config import Policy


def given_by(*options: str) -> dict:
    """Return the values of a command with two records and a parameter."""
    app, got = typer.Typer(), {}

    short, greedy = MemoryOptions(context=64), SamplingOptions(seed=3)

    @app.command()
    @expand_options
    def one(
        model: str,
        options: MemoryOptions = short,
        port: int = 1,
        sampling: SamplingOptions = greedy,
    ):
        got.update(model=model, options=options, port=port, sampling=sampling)

    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    return got


def test_no_options_equal_defaults() -> None:
    assert given_by("a") == {
        "model": "a",
        "options": MemoryOptions(context=64),
        "port": 1,
        "sampling": SamplingOptions(seed=3),
    }
    assert not ServingOptions(context=64).is_served
    assert ServingOptions(host_compute=HostCompute.monde).is_served, "it would be ignored"
    assert ServingOptions().mode_settings() == {"mode": "exact"}
    assert ServingOptions(bound=0.2).mode_settings() == {"mode": "exact", "bound": 0.2}


def test_each_field_is_an_option() -> None:
    options = "--memory 3GiB --precision int4 --context 5 --dtype bfloat16 --top-k 4"
    got = given_by("a", "--port", "7", *options.split())
    assert (got["port"], got["sampling"].given()) == (7, {"top_k": 4, "seed": 3})
    memory = got["options"]
    assert (memory.memory, memory.precision, memory.context) == ("3GiB", "int4", 5)
    assert memory.sets_memory and str(memory.load_settings()["dtype"]) == "torch.bfloat16"
    serving = ServingOptions(mode=ModeName.virtual, prefill=ModeName.exact)
    assert serving.mode_settings() == {"mode": "virtual", "prefill": "exact"}


@pytest.mark.parametrize("vain", [["--bound", "0.5"], ["--bound", "0.5", "--mode", "virtual"]])
@pytest.mark.parametrize("command", [["generate", "reference", "a"], ["chat", "reference"]])
def test_bound_without_bounded_mode_raises(command: list[str], vain: list[str]) -> None:
    done = CliRunner().invoke(cli, [*command, *vain])
    assert isinstance(done.exception, ConfigError)
    assert "--bound 0.5 is for the mode bounded" in str(done.exception)


def test_each_option_counts_as_given() -> None:
    for one in (
        ServingOptions(mode=ModeName.exact),
        ServingOptions(prefill=ModeName.virtual),
        ServingOptions(bound=0.1),
    ):
        assert one.sets_mode and one.is_served and not (one.sets_memory or one.has_plan)
    for one in (
        ServingOptions(mode=ModeName.bounded, bound=0.1),
        ServingOptions(prefill=ModeName.bounded, bound=0),
    ):
        one.check_bound()


def test_options_are_bounded() -> None:
    app = typer.Typer()

    @app.command()
    @expand_options
    def one(options: ServingOptions = ServingOptions()):  # noqa: B008 - immutable
        raise AssertionError("not reached")

    refused = CliRunner().invoke(app, ["--bound", "2"])
    assert refused.exit_code == 2 and "--bound" in refused.output
    help = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert "--prefill" in help and f"Default: {Policy().bound}" in help


def shown(group: Any, name: str) -> list[Any]:
    """Return the options of a command outside the panel "Advanced", with --help."""
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
        elif name == "cache":
            assert len(shown(loaded.cache, "prune")) <= 10
        elif name == "law":
            assert len(shown(loaded.law, "fit")) <= 10
        else:
            assert len(shown(cli, name)) <= 10, name
    served = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "200"}).output
    main, advanced = served.split("Advanced")
    assert "--memory" in main and "--exact" in main and "--dense-precision" not in main
    assert "--dense-precision" in advanced and "--rest" not in served
