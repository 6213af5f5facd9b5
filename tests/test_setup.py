"""The package's own build of the kernels, with a compiler and without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MISSING = {"CC": "/no/such/cc", "CXX": "/no/such/c++"}


def build(to: Path, **environment: str) -> tuple[list[str], str]:
    """The files made, and what was said."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", to, "--build-temp", to / "o"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [file.name for file in to.rglob("*.so")], done.stdout + done.stderr


def test_without_a_compiler_the_build_goes_on_and_says_so(tmp_path: Path) -> None:
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
def test_with_a_compiler_it_makes_a_library_that_runs(tmp_path: Path) -> None:
    (name,), _ = build(tmp_path)
    assert name.startswith("_kernels")
    (library,) = tmp_path.rglob("*.so")
    command = [sys.executable, "-c", USED, str(library.parent / "kernels.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) == 70
