"""Structure of the package: layers of imports, and imports without side effects."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import moefit

ROOT = Path(moefit.__file__).parent
# Each layer may import those before it and itself; names on one line never import each other.
LAYERS = (
    {"errors"},
    {"cache_argument", "device", "folders", "graphs", "host", "signals", "yaml_text"},
    {"moe"},
    {"checkpoint"},
    {"quant"},
    {"dsmoe"},
    {"train", "serve"},
    {"engine", "gguf"},
    {"evaluate"},
    {"plan"},
    {"advise", "simulate"},
    {"api"},
    {"tasks"},
    {"report"},
    {"server"},
    {"demo_serving"},
    {"demo"},
    {"cli"},
)
MOST_FILES = 15


def parts(path: Path) -> list[str]:
    names = list(path.relative_to(ROOT).with_suffix("").parts)
    return names[:-1] if names[-1] == "__init__" else names


MODULES = {".".join(["moefit", *parts(path)]): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Return the moefit modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names} | {str(node.module)}
    return found & MODULES.keys()


def layer(module: str) -> tuple[int, str]:
    part = module.split(".")[1]
    for height, names in enumerate(LAYERS):
        if part in names:
            return height, part
    raise AssertionError(f"{module} has no place in LAYERS; give it one in docs and here")


def test_architecture_page_lists_every_module() -> None:
    page = (ROOT.parents[1] / "docs" / "architecture.md").read_text()
    listed: set[str] = set()
    folder = ""
    for line in page.split("```")[1].strip().splitlines():
        first, *names = line.split()
        folder = folder if line[0] == " " else "" if first == "(top)" else first
        names = [first, *names] if line[0] == " " else names
        listed |= {folder + name for name in names}
    actual = {p.relative_to(ROOT).with_suffix("").as_posix() for p in MODULES.values()}
    assert listed == {one for one in actual if not one.endswith(("__init__", "__main__"))}


def test_pages_of_the_site_are_all_there_are() -> None:
    docs = ROOT.parents[1] / "docs"
    nav = (ROOT.parents[1] / "mkdocs.yml").read_text().split("\nnav:")[1]
    listed = re.findall(r"[\w./-]+\.md", nav)
    assert sorted(listed) == sorted(one.relative_to(docs).as_posix() for one in docs.rglob("*.md"))


def test_every_module_has_a_layer() -> None:
    for module in MODULES.keys() - {"moefit", "moefit.__main__"}:
        layer(module)


def test_imports_follow_layers() -> None:
    wrong = []
    for module in MODULES.keys() - {"moefit", "moefit.__main__"}:
        height, part = layer(module)
        for other in imports(MODULES[module]) - {"moefit"}:
            other_height, other_part = layer(other)
            if other_height > height or (other_height == height and other_part != part):
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_package_init_imports_nothing() -> None:
    assert imports(MODULES["moefit"]) <= {"moefit"}


def test_imports_have_no_cycles() -> None:
    graph = {module: imports(path) - {module, "moefit"} for module, path in MODULES.items()}
    while leaves := {module for module, needs in graph.items() if not needs}:
        graph = {m: needs - leaves for m, needs in graph.items() if m not in leaves}
    assert not graph, f"a cycle among {sorted(graph)}"


def test_folders_have_few_files() -> None:
    """Count files per folder without `__init__.py` and data."""
    large = {}
    for folder in (ROOT, *(path for path in ROOT.rglob("*") if path.is_dir())):
        name = folder.relative_to(ROOT).as_posix()
        files = [
            path.name
            for path in folder.iterdir()
            if path.suffix in {".py", ".js", ".cpp", ".h"} and path.name != "__init__.py"
        ]
        if len(files) > MOST_FILES:
            large[name] = len(files)
    assert not large


REGISTERS_NOTHING = """
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
implementations = set(ALL_EXPERTS_FUNCTIONS.keys())
import moefit.dsmoe.export
from moefit.dsmoe.model import register
from moefit.dsmoe.dense_experts import register_dense_experts
assert "dsmoe" not in CONFIG_MAPPING
assert set(ALL_EXPERTS_FUNCTIONS.keys()) == implementations
register()
assert "dsmoe" in CONFIG_MAPPING
assert set(ALL_EXPERTS_FUNCTIONS.keys()) == implementations
register_dense_experts()
assert set(ALL_EXPERTS_FUNCTIONS.keys()) == implementations | {"moefit_dense"}
"""


def test_importing_registers_nothing() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", REGISTERS_NOTHING], check=True)
