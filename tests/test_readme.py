"""Python examples, commands, links and length of README and docs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moefit.evaluate.loading import reference_path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHOWN = [README, *(ROOT / "docs" / f"{name}.md" for name in ("api", "training"))]


def blocks(page: Path, language: str) -> list[str]:
    """Return the page's examples in this language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


EXAMPLES = {
    f"{page.stem}-{number}": example
    for page in SHOWN
    for number, example in enumerate(blocks(page, "python"))
}
CONSOLE = "\n".join(blocks(README, "console"))
COMMANDS = re.findall(r"^\$ (moefit .*)$", CONSOLE, re.MULTILINE)
SERVED = [one for one in COMMANDS if one.startswith("moefit serve")]
needs_reference = pytest.mark.skipif(
    not (reference_path() / "model.safetensors").is_file(), reason="no reference model yet"
)


@needs_reference
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.startswith("README") else pytest.mark.slow)
        for name in EXAMPLES
    ],
)
def test_python_examples_run(name):
    """Run in a separate process, whose size is like a user's."""
    command = [sys.executable, "-c", EXAMPLES[name]]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip()


def run(command: str, *more: str) -> subprocess.CompletedProcess:
    arguments = [sys.executable, "-m", *shlex.split(command), *more]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120)


@needs_reference
@pytest.mark.parametrize("command", [one for one in COMMANDS if one not in SERVED])
def test_commands_print_documented_output(command):
    made = run(command)
    assert made.returncode == 0, made.stderr
    shown = CONSOLE[CONSOLE.index(command) + len(command) + 1 :].split("$ ")[0].strip()
    printed = " ".join(made.stdout.split())
    for line in filter(None, map(str.strip, shown.splitlines())):
        assert re.sub(r"\s+", " ", line) in printed, (line, made.stdout)


def test_server_example_options_exist():
    assert len(SERVED) == 1
    known = run("moefit serve", "--help").stdout
    assert all(option in known for option in re.findall(r"--[a-z-]+", SERVED[0]))


def test_readme_is_short():
    assert len(README.read_text().split()) <= 520


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_are_valid(page):
    """Linked files and headings exist."""
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^a-z0-9 -]", "", one.lower()).replace(" ", "-") for one in titles]
            assert heading in anchors, f"{page.name}: {target}"
