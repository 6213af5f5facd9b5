"""Imports of the command line: nothing heavy for help, no training code for serving."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import moefit
from moefit.cli.app import COMMANDS, app

HEAVY = ("torch", "transformers", "numpy", "matplotlib")


def run(code: str) -> str:
    """Run Python code in a separate process and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout


def loaded_after(statement: str, names: tuple[str, ...]) -> list[str]:
    """Return those of `names` that are imported after running `statement`."""
    code = f"{statement}\nimport sys\nprint(*[n for n in {names!r} if n in sys.modules])"
    return run(code).splitlines()[-1].split()


def command(*arguments: str) -> str:
    """Return a statement that runs `moefit ARGUMENTS` without exiting."""
    return (
        f"import sys; sys.argv = ['moefit', *{arguments!r}]\n"
        "from moefit.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code"
    )


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option: str) -> None:
    assert loaded_after(command(option), HEAVY) == []


LIGHT_BUDGET = """
import json, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"asked": self.path}}).encode())

server = HTTPServer(("127.0.0.1", 0), Answer)
threading.Thread(target=server.serve_forever, daemon=True).start()
import sys
sys.argv = ["moefit", "budget", "get", "--json", "--url", f"http://127.0.0.1:{{server.server_port}}"]
from moefit.cli import main
try: main()
except SystemExit as end: assert not end.code, end.code
print(*[n for n in {heavy!r} if n in sys.modules])
"""


def test_budget_get_imports_nothing_heavy() -> None:
    """It answers while a server computes, and may be asked every second."""
    heavy = (*HEAVY, "fastapi", "starlette")
    *answer, loaded = run(LIGHT_BUDGET.format(heavy=heavy)).splitlines()
    assert json.loads("".join(answer)) == {"asked": "/v1/memory"}
    assert loaded == ""


def test_help_lists_all_commands_and_version_matches_package() -> None:
    shown = run(command("--help"))
    assert all(name in shown for name in COMMANDS)
    assert run(command("--version")).strip() == moefit.__version__


def test_serving_and_loading_import_neither_training_nor_matplotlib() -> None:
    serving = (
        "import moefit.cli.serve, moefit.cli.models, moefit.cli.chat, moefit.api, moefit\n"
        "moefit.load('reference', context=64).close()"
    )
    assert loaded_after(serving, ("moefit.train", "matplotlib", "torch")) == ["torch"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_importable(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert COMMANDS[name][1].split()[0] in done.output


def test_unknown_command_names_nearest() -> None:
    done = CliRunner().invoke(app, ["genrate"])
    assert done.exit_code == 2 and "generate" in done.output
