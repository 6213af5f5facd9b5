"""DS-MoE's throughput tables: dense, sparse and DS-MoE shapes with random weights.

    python benchmarks/paper_throughput.py [--size 1b] [--layers 3] [--save NAME]
    python benchmarks/paper_throughput.py --size 6b --paper
    python benchmarks/paper_throughput.py --size 1b --write-configs FOLDER
    VLLM_PYTHON benchmarks/paper_throughput.py --size 1b --engine vllm --configs FOLDER --paper

The paper's Tables 5 (transformers) and 7 (vLLM), and Figure 1 of its article (one token in). By
default a small measurement for a CPU: some layers of the shape, a batch of 4, prompts of 512.
`--paper` has the paper's sizes, for a GPU. The speed of a model depends on its shape and not on its
weights, but which experts a threshold chooses does; so DS-MoE has a fixed number here, as in the
paper's table of speeds. vLLM runs in an environment without moefit, which needs configurations from
`--write-configs`; it makes random weights itself.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import record
import torch

# Shapes of each size by kind: preset, and rule. The paper's K is 6 for 3B and 4 for 6B.
SHAPES = {
    "1b": {
        "dense": ("dense-1b", "dense"),
        "sparse": ("smoe-1b", "top_k:2"),
        "dsmoe": ("dsmoe-1b", "top_k:6"),
    },
    "3b": {
        "dense": ("dense-3b", "dense"),
        "sparse": ("smoe-5b", "top_k:2"),
        "dsmoe": ("dsmoe-3b", "top_k:6"),
    },
    "6b": {"dense": ("dense-6b", "dense"), "dsmoe": ("dsmoe-6b", "top_k:4")},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests of a measurement: all begin at once, with prompts of random tokens."""

    name: str
    batch: int
    prompt: int
    new: int


SMALL = (
    Load(name="small", batch=4, prompt=512, new=16),
    Load(name="one token in", batch=4, prompt=1, new=32),
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
    """Measure a load: with one new token, which is the prompt's time, and with all.

    Args:
        load: The requests.
        generate: Generates the given number of new tokens for all of them.
    """
    generate(min(2, load.new))  # compiles and allocates, for prompts and for decoding
    began = time.perf_counter()
    generate(1)
    first = time.perf_counter() - began
    whole = first
    if load.new > 1:
        began = time.perf_counter()
        generate(load.new)
        whole = time.perf_counter() - began
    rest = load.batch * (load.new - 1)
    return Speed(
        load=load,
        seconds=whole,
        input_per_second=load.batch * load.prompt / first,
        output_per_second=rest / (whole - first) if rest else None,
    )


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
    return {"speeds": speeds, "weight_bytes": weights, "peak_gpu_bytes": peak}


def with_vllm(folder: Path, loads: tuple[Load, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Measure vLLM, which makes random weights for a configuration."""
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
    return {"speeds": speeds}


def _alone(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call a function in a process of its own, whose end frees all GPU memory."""
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawning) as process:
        return process.submit(measure, *arguments).result()


def show(results: dict[str, Any]) -> None:
    """Print a table of speeds, each beside its ratio to the dense model's."""
    for name in results:
        for number, speed in enumerate(results[name]["speeds"]):
            dense = results["dense"]["speeds"][number]
            parts = [f"{name:7} {speed['load']['name']:16} {speed['seconds']:8.2f} s"]
            for key in ("input_per_second", "output_per_second"):
                if speed[key] is not None:
                    ratio = speed[key] / dense[key]
                    parts.append(f"{key.split('_')[0]} {speed[key]:9.1f} tokens/s ({ratio:.2f}x)")
            print("  ".join(parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(SHAPES), default="1b")
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--paper", action="store_true", help="the paper's sizes, for a GPU")
    parser.add_argument("--layers", type=int, help="of the shape; all by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--write-configs", type=Path, help="write what --engine vllm reads, only")
    parser.add_argument("--configs", type=Path)
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    if (arguments.engine == "vllm") != (arguments.configs is not None):
        parser.error("--engine vllm and --configs FOLDER belong together")
    loads = PAPER[arguments.engine] if arguments.paper else SMALL
    dtype = getattr(torch, arguments.dtype)
    results: dict[str, Any] = {}
    for name, (preset_name, rule) in SHAPES[arguments.size].items():
        if arguments.engine == "vllm":
            results[name] = _alone(with_vllm, arguments.configs / name, loads, dtype)
            continue
        settings = configuration(preset_name, rule, arguments.layers)
        if arguments.write_configs:
            folder = arguments.write_configs / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(settings, indent=1, default=str) + "\n")
            continue
        results[name] = with_transformers(settings, loads, dtype)
        results[name] |= {"preset": preset_name, "rule": rule}
    if arguments.write_configs:
        return
    show(results)
    if arguments.save:
        notes = (
            f"random weights, {arguments.dtype}; {arguments.layers or 'all'} layers of the shape; "
            f"one measurement after a warm-up; peak RSS of all shapes "
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024:,} bytes"
        )
        print(record.write("paper-throughput", results, notes=notes, suffix=arguments.save))


if __name__ == "__main__":
    main()
