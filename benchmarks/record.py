"""Write a benchmark's result with machine, versions, commit and command to benchmarks/results."""

import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Return processor, threads and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = {line.split(":")[1].strip() for line in lines if line.startswith("model name")}
    facts = {
        "cpu": ", ".join(sorted(names)) or platform.processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def write(question: str, results: Any, *, notes: str, suffix: str = "") -> Path:
    """Write benchmarks/results/QUESTION[-SUFFIX]-DATE.json and return its path."""
    git = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    record = {
        "question": question,
        "date": date.today().isoformat(),
        "commit": commit,
        "command": " ".join(["python", *map(_portable, sys.argv)]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": machine(),
        "notes": notes,
        "results": results,
    }
    name = "-".join(part for part in (question, suffix, record["date"]) if part)
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _portable(argument: str) -> str:
    """Shorten an absolute path, which depends on the machine, to its last part."""
    name, equals, path = argument.rpartition("=")
    return f"{name}{equals}{Path(path).name}" if path.startswith("/") else argument
