"""How much memory do the interpreter and the libraries of a serving process take, by part?

Imports what `moefit serve` imports, one group after the other, in a process of its own, and reads
the resident set after each. What a group imports first is counted there, so the order matters: it
is that in which transformers' modules need each other.

    python benchmarks/import_memory.py [--save]
"""

import argparse
import importlib
import json
import subprocess
import sys

GROUPS = {
    "interpreter": (),
    "numpy": ("numpy",),
    "torch": ("torch",),
    "huggingface_hub, transformers' utilities": ("transformers.utils", "transformers"),
    "sympy": ("sympy",),
    "torch.distributed, DTensor, FSDP": (
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
    ),
    "torch._dynamo": ("torch._dynamo",),
    "transformers.modeling_utils, generation": (
        "transformers.modeling_utils",
        "transformers.generation",
    ),
    "tokenizers, Auto classes": (
        "tokenizers",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
    ),
    "pydantic, FastAPI, uvicorn, prometheus_client": ("fastapi", "uvicorn", "prometheus_client"),
    "typer, rich": ("typer", "rich.console"),
    "moefit": ("moefit.cli.serve",),
}
# Groups that transformers.modeling_utils imports itself, whatever is imported before it.
FORCED = 8
UNWANTED = ("matplotlib", "pandas", "sklearn", "scipy", "datasets", "tensorboard", "moefit.train")


def resident() -> int:
    """The resident set of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def measure() -> None:
    rows, before = [], 0
    for name, modules in GROUPS.items():
        for module in modules:
            importlib.import_module(module)
        now = resident()
        rows.append({"group": name, "bytes": now - before, "sum": now, "modules": len(sys.modules)})
        before = now
    imported = [name for name in UNWANTED if name in sys.modules]
    print(json.dumps({"groups": rows, "unwanted": imported}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="write the record")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure()
        return
    command = [sys.executable, __file__, "--measure"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # Here, because the measured process, which is this file too, must not have imported them.
    import record
    from rich.console import Console
    from rich.table import Table

    shown = Table("group", "MiB", "sum", "modules")
    for one in found["groups"]:
        mib, total = (f"{one[name] / 2**20:.1f}" for name in ("bytes", "sum"))
        shown.add_row(one["group"], mib, total, str(one["modules"]))
    Console().print(shown)
    if options.save:
        notes = (
            f"the first {FORCED} groups are imported by transformers.modeling_utils itself; "
            "unwanted: modules that a serving process has no use for and that were imported"
        )
        print(record.write("import-memory", found, notes=notes))


if __name__ == "__main__":
    main()
