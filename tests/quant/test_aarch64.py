"""The portable kernels built for aarch64 and run under an emulator: the same bits as here.

`make test-aarch64`. Needs Debian's g++-aarch64-linux-gnu and qemu-user, and g++ for this machine,
whose side is the compiled library that other tests compare with torch.
"""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moefit.quant import library

SOURCES = Path(library.__file__).parent / "csrc"
DRIVER = Path(__file__).parents[1] / "helpers" / "kernel_digest.cpp"
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = [
    "-O2",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-std=c++17",
    "-fopenmp",
    "-Wno-psabi",
]

needs_tools = pytest.mark.skipif(
    sys.platform != "linux" or not all(map(shutil.which, (CROSS, EMULATOR, "g++"))),
    reason=f"needs {CROSS} (Debian: g++-aarch64-linux-gnu), {EMULATOR} (qemu-user) and g++",
)


def compiled(compiler: str, source: Path, folder: Path) -> str:
    """Compile a source and return the object file."""
    made = str(folder / f"{source.name}.o")
    subprocess.run([compiler, *FLAGS, f"-I{SOURCES}", "-c", str(source), "-o", made], check=True)
    return made


def digests(program: Path, *emulator: str) -> dict[str, str]:
    """Return the digest of each output by name."""
    done = subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True)
    return dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())


def built_for_aarch64(folder: Path) -> Path:
    with ThreadPoolExecutor(2) as pool:
        sources = [DRIVER, *sorted(SOURCES.rglob("*.cpp"))]
        objects = list(pool.map(lambda one: compiled(CROSS, one, folder), sources))
    program = folder / "there"
    command = [CROSS, "-static", "-fopenmp", *objects, "-o", str(program)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)  # warns of dlopen in libgomp
    return program


def built_for_this_machine(folder: Path, library: Path) -> Path:
    program, driver = folder / "here", compiled("g++", DRIVER, folder)
    where = f"-Wl,-rpath,{library.parent}"
    subprocess.run(["g++", "-fopenmp", driver, str(library), where, "-o", str(program)], check=True)
    return program


@pytest.mark.slow
@needs_tools
def test_portable_kernels_have_the_same_bits_on_aarch64(tmp_path: Path) -> None:
    built = library.library()
    if built is None:
        pytest.skip("no compiled kernels here")
    there = digests(built_for_aarch64(tmp_path), EMULATOR)
    here = digests(built_for_this_machine(tmp_path, Path(built._name)))
    assert there.pop("levels") == "1"  # portable alone
    here.pop("levels")
    assert len(there) > 80
    assert {name for name in here if here[name] != there.get(name)} == set()
