"""Compare the perplexity of moefit's formats and llama.cpp's quantised types by their bytes.

    python benchmarks/quality_against_gguf.py MODEL --text FILE --calibration FILE
        --rival-python PYTHON [--tokens 8192] [--context 256] [--types Q4_K_M,...]
        [--formats int4,...] [--save NAME]

MODEL is an OLMoE whose widths are multiples of 256, as K-quants require. It is written as f16 GGUF
by `moefit export` and quantised by llama.cpp, with `+imatrix` by the mean squared inputs of the
calibration text. Both sides score the same windows of token ids from an empty context. moefit's
dense weights have the experts' format, or with FORMAT+DENSE that of `--dense`; experts are rounded
to nearest (`nearest`), fitted (`fitted`), or packed with the calibration text (`calibrated`), and
dense weights too (`all calibrated`). Loss is the increase of perplexity over transformers in
float32, with its standard error over windows.
"""

import argparse
import json
import math
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import quality_against_bytes as by_bytes
import record
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from subject import Subject
from torch import Tensor
from torch.nn import functional as F
from transformers import OlmoeForCausalLM

from moefit.checkpoint.gguf.families import expert_name
from moefit.gguf.write import write_gguf
from moefit.quant.format import weights_in

TYPES = (
    "F16,Q8_0,Q6_K,Q5_K_M,Q4_0,Q4_K_M,Q4_K_M+imatrix,IQ4_XS+imatrix,Q3_K_M,Q3_K_M+imatrix,"
    "IQ3_XXS+imatrix,Q2_K,Q2_K+imatrix,IQ2_S+imatrix,IQ2_XXS+imatrix"
)
FORMATS = "int8,int6,int5,int4,int3,int2"
WAYS = ("nearest", "fitted", "calibrated", "all calibrated")
IMPORTANCE_WINDOWS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--rival-python", required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--dense", default="int8,int4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    subject = Subject(arguments.model, None, arguments, dtype=torch.float32)
    exact = OlmoeForCausalLM.from_pretrained(
        subject.folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    full = [window_loss(exact, one) for one in subject.scored]
    points = [*theirs(subject, exact, full, arguments), *ours(subject, full, arguments)]
    Console(width=120).print(table(points, math.exp(fmean(full))))
    if arguments.save:
        results = {"perplexity": math.exp(fmean(full)), "windows": len(full), "points": points}
        path = record.write(
            "quality-against-gguf", results, notes=str(__doc__), suffix=arguments.save
        )
        draw(points, path.with_suffix(".png"))
        print(path)


@torch.inference_mode()
def window_loss(model: Any, window_L: Tensor) -> float:
    logits_LV = model(window_L[None, :-1], use_cache=False).logits[0].float()
    return float(F.cross_entropy(logits_LV, window_L[1:]))


def point(side: str, name: str, losses: list[float], full: list[float], **sizes: Any) -> Any:
    costs = [loss - own for loss, own in zip(losses, full, strict=True)]
    error = stdev(costs) / math.sqrt(len(costs))
    print(f"{side} {name}: {math.expm1(fmean(costs)):+.3%}", flush=True)
    return {"side": side, "name": name, "loss": math.expm1(fmean(costs)), "error": error, **sizes}


def theirs(
    subject: Subject, exact: OlmoeForCausalLM, full: list[float], arguments: argparse.Namespace
) -> Iterator[Any]:
    """Yield a point per type of llama.cpp."""
    with TemporaryDirectory() as folder:
        file, importance = Path(folder) / "f16.gguf", Path(folder) / "importance.npz"
        write_gguf(subject.folder, file)
        np.savez(importance, **MeanSquares(exact).over(subject_windows(subject, arguments)))
        work = {
            "file": str(file),
            "folder": folder,
            "types": arguments.types.split(","),
            "windows": [window_L.tolist() for window_L in subject.scored],
            "threads": arguments.threads,
            "importance": str(importance),
        }
        script = Path(__file__).with_name("llama_cpp_quality.py")
        made = subprocess.run(
            [arguments.rival_python, script],
            input=json.dumps(work),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    for line in made.stdout.splitlines():
        found = json.loads(line)
        name, losses = found.pop("type"), found.pop("losses")
        yield point("llama.cpp", name, losses, full, **found)


def subject_windows(subject: Subject, arguments: argparse.Namespace) -> list[Tensor]:
    """Return the windows of the calibration text."""
    tokenizer = by_bytes.read_tokenizer(subject.folder)
    text = by_bytes.text_of_file(
        arguments.calibration, tokenizer, subject.context, by_bytes.CALIBRATION_TOKENS
    )
    return list(by_bytes.windows_of(text).ids_BT)[:IMPORTANCE_WINDOWS]


class MeanSquares:
    """Mean squared inputs of each matrix by its name in the file; [E, D] of the experts'."""

    def __init__(self, model: OlmoeForCausalLM):
        self.model = model
        self.sums: dict[str, Any] = defaultdict(float)
        self.counts: dict[str, Any] = defaultdict(float)

    @torch.inference_mode()
    def over(self, windows: list[Tensor]) -> dict[str, Any]:
        hooks = [self.model.lm_head.register_forward_pre_hook(self.dense("output.weight"))]
        for number, layer in enumerate(self.model.model.layers):
            for short, name in {"q": "q", "k": "k", "v": "v", "o": "output"}.items():
                module = getattr(layer.self_attn, f"{short}_proj")
                hook = self.dense(f"blk.{number}.attn_{name}.weight")
                hooks.append(module.register_forward_pre_hook(hook))
            experts = layer.get_submodule("mlp.experts")
            hooks.append(experts.register_forward_pre_hook(self.experts(number)))
        for window_L in windows:
            self.model(window_L[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        return {
            name: (self.sums[name] / self.counts[name].clamp(min=1)).numpy() for name in self.sums
        }

    def dense(self, name: str) -> Any:
        return lambda module, inputs: self.observe(name, [inputs[0].flatten(0, -2)])

    def experts(self, layer: int) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            x_TD, ids_TK, _ = inputs
            x_ERD = [x_TD[(ids_TK == one).any(-1)] for one in range(module.num_experts)]
            h_ERF = []
            for x_RD, gate_up in zip(x_ERD, module.gate_up_proj, strict=True):
                gate_RF, up_RF = F.linear(x_RD, gate_up).chunk(2, -1)
                h_ERF.append(F.silu(gate_RF) * up_RF)
            for part, inputs_E in {"gate": x_ERD, "up": x_ERD, "down": h_ERF}.items():
                self.observe(expert_name(layer, part), inputs_E)

        return hook

    def observe(self, name: str, x_ERD: list[Tensor]) -> None:
        self.sums[name] += torch.stack([x_RD.square().sum(0) for x_RD in x_ERD])
        self.counts[name] += torch.tensor([[float(len(x_RD))] for x_RD in x_ERD])


def ours(subject: Subject, full: list[float], arguments: argparse.Namespace) -> Iterator[Any]:
    """Yield a point per format, way of rounding and format of dense weights."""
    formats, dense = arguments.formats.split(","), arguments.dense.split(",")
    with by_bytes.alone():
        for way in WAYS:
            if "calibrated" in way:
                packed = [*formats, *dense] if way == "all calibrated" else []
                text = arguments.calibration
                by_bytes.pack_by(subject, text, torch.float32, formats, packed)
            for format in formats:
                precision = f"{format}-nearest" if way == "nearest" else format
                for rest in dict.fromkeys((format, *(dense if "calibrated" in way else ()))):
                    yield one_of_ours(subject, full, way, precision, rest)


def one_of_ours(subject: Subject, full: list[float], way: str, precision: str, rest: str) -> Any:
    with subject.load(precision=precision, dense_precision=rest) as served:
        losses = [window_loss(served.model, window_L) for window_L in subject.scored]
        report = served.report()
        assert (report["experts_from"] == "packed") == ("calibrated" in way)
        assert (report["dense_from"] == "packed") == (way == "all calibrated")
        weights = sum(
            block.num_experts * weights_in(block.block.layout.specs)
            for block in served.blocks.values()
        )
        dense = report["budget"]["weights"]  # the embedding included, as in llama.cpp's file
        slots = report["slot_bytes"]
    name = precision.removesuffix("-nearest")
    return point(
        f"moefit {way}",
        name if rest == name else f"{name}+{rest}",
        losses,
        full,
        expert_bytes=slots,
        weight_bytes=slots + dense,
        expert_bits=8 * slots / weights,
    )


def table(points: list[Any], perplexity: float) -> Table:
    out = Table(title=f"perplexity {perplexity:.3f} in float32", title_justify="left")
    for heading in ("engine", "format", "expert KiB", "all weights KiB", "loss", "error"):
        out.add_column(heading, justify="left" if heading in ("engine", "format") else "right")
    for one in points:
        sizes = (f"{one[key] / 1024:,.0f}" for key in ("expert_bytes", "weight_bytes"))
        costs = f"{one['loss']:+.2%}", f"{one['error']:.2%}"
        out.add_row(one["side"], one["name"], *sizes, *costs)
    return out


def draw(points: list[Any], path: Path) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    titles = {"expert_bytes": "experts", "weight_bytes": "all weights"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        groups: dict[str, list[Any]] = defaultdict(list)
        for one in points:
            matrix = one["name"].endswith("+imatrix")
            is_mixed = "moefit" in one["side"] and "+" in one["name"]
            mixed = f", dense {one['name'].split('+')[-1]}" if is_mixed else ""
            suffix = ", imatrix" if matrix else mixed
            groups[one["side"] + suffix].append((one[key] / 2**20, 100 * one["loss"]))
        for label, line in groups.items():
            style = "s--" if "llama" in label else "o-"
            axes.plot(*zip(*sorted(line), strict=True), style, ms=4, label=label)
        axes.set_yscale("symlog", linthresh=0.5)
        axes.set_xlabel(f"MiB of {title}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("perplexity above float32, %")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
