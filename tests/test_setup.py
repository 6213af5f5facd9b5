"""The package as it is built and installed: kernels, the files of a wheel, dependencies."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
MISSING = {"CC": "/no/such/cc", "CXX": "/no/such/c++"}


def setup(*command: str | Path, **environment: str) -> str:
    """Return the output of a setup.py command."""
    done = subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def build(to: Path, **environment: str) -> tuple[list[str], str]:
    """Return the created files and the output."""
    said = setup("build_ext", "--build-lib", to, "--build-temp", to / "o", **environment)
    return [file.name for file in to.rglob("*.so")], said


def wheel(to: Path, **environment: str) -> tuple[str, set[str]]:
    """Return the name of a wheel and its files."""
    metadata = ["egg_info", "--egg-base", to]
    made = ["build", "--build-base", to / "b", "bdist_wheel", "--bdist-dir", to / "d"]
    setup(*metadata, *made, "--dist-dir", to, **environment)
    (file,) = to.glob("*.whl")
    return file.name, set(ZipFile(file).namelist())


def test_build_without_compiler_warns(tmp_path: Path) -> None:
    files, said = build(tmp_path, **MISSING)
    assert not files
    assert "the kernels were not built" in said and "Install a C++ compiler" in said


USED = """
import sys, torch
from moefit.quant import cpu_kernels as module
module.__file__ = sys.argv[1]
made = module.kernels()
assert made is not None and made.level == module.status(), module.status()
print(float(made.linear(torch.ones(1, 70), torch.ones(3, 70))[0, 2]))
"""


@pytest.mark.slow
def test_build_with_compiler_works(tmp_path: Path) -> None:
    (name,), _ = build(tmp_path)
    assert name.startswith("_kernels")
    (library,) = tmp_path.rglob("*.so")
    command = [sys.executable, "-c", USED, str(library.parent / "kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) == 70


def source_files() -> set[str]:
    """Files that a wheel must contain: modules, reference model and page."""
    folder = ROOT / "src"
    found = [*folder.rglob("*.py"), folder / "moefit/py.typed"]
    found += (file for file in folder.glob("moefit/*/page/**/*") if file.is_file())
    found += (folder / "moefit/reference_model").iterdir()
    return {file.relative_to(folder).as_posix() for file in found}


def test_a_wheel_has_every_module_the_reference_model_and_the_page(tmp_path: Path) -> None:
    _, files = wheel(tmp_path, **MISSING)
    assert source_files() <= files
    others = {name for name in files - source_files() if ".dist-info/" not in name}
    data = {one.relative_to(ROOT / "src").as_posix() for one in (ROOT / "src").rglob("data/*.yaml")}
    assert data and others == data


@pytest.mark.slow
def test_a_wheel_has_the_kernels_for_every_supported_python(tmp_path: Path) -> None:
    name, files = wheel(tmp_path)
    assert re.fullmatch(r"moefit-[\d.]+-cp311-abi3-linux_x86_64\.whl", name)
    assert "moefit/quant/_kernels.abi3.so" in files


# triton: imported where a GPU is used; torch's builds for CUDA bring it. opentelemetry: a name that
# several packages share, of which the extra `otel` has two.
BROUGHT = {"triton", "opentelemetry"}


def test_what_is_imported_is_declared_and_the_reverse() -> None:
    imported = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    imported -= sys.stdlib_module_names | BROUGHT | {"moefit"}
    distributions = packages_distributions()
    needed = {_normal(distributions[name][0]) for name in imported}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (
        *project["dependencies"],
        *(
            one
            for extra in ("laws", "structured")
            for one in project["optional-dependencies"][extra]
        ),
    )
    declared = {_normal(re.split(r"[<>=~!\[ ]", line)[0]) for line in lines}
    assert needed == declared


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
