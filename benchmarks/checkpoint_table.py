"""Does moefit compute what transformers computes, for checkpoints of many kinds and formats?

For each model folder: the decoded weights are written as a plain checkpoint, which transformers
loads and computes in float32. moefit serves the quantised folder itself in float32, with all
experts in memory and with one slot per layer, and is compared in logits and greedy tokens. Where
transformers can load the quantised folder too, the decoded weights are compared with its own,
bit by bit. Needs accelerate, and compressed-tensors for that format.

    python benchmarks/checkpoint_table.py FOLDER [FOLDER ...] [--save]
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import record
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import moefit
from moefit.errors import MoefitError
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.memory.estimate import memory_budget

READ_BY_TRANSFORMERS = ("fp8", "mxfp4", "compressed-tensors")  # without further libraries
TOKENS, NEW = (2, 24), 12


def plain_copy(skeleton: Skeleton, folder: Path) -> Path:
    """Write the decoded weights, and the configuration without its declaration."""
    checkpoint = skeleton.checkpoint
    left = set(skeleton.map.unused)
    tensors = {n: checkpoint.tensor(one) for n, one in checkpoint.weights.items() if n not in left}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((checkpoint.folder / "config.json").read_text())
    for inner in (values, *(one for one in values.values() if isinstance(one, dict))):
        inner.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def outputs(model: Any, ids_BT: Tensor) -> tuple[Tensor, list[int]]:
    with torch.inference_mode():
        logits = model(input_ids=ids_BT).logits.float()
        made = model.generate(
            input_ids=ids_BT[:1],
            attention_mask=torch.ones_like(ids_BT[:1]),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return logits, made[0, ids_BT.shape[1] :].tolist()


def of_transformers(folder: Path, dtype: torch.dtype) -> Any:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype).eval()


def bit_equal_weights(folder: Path, plain: Path, dtype: torch.dtype) -> str:
    """Compare transformers' own loading of both folders, in the weights that it dequantises."""
    config = json.loads((folder / "config.json").read_text())
    declared = config.get("quantization_config", config.get("text_config", {}))
    if "quantization_config" in declared:
        declared = declared["quantization_config"]
    if declared.get("quant_method") not in READ_BY_TRANSFORMERS:
        return "not read by transformers"
    try:
        own = of_transformers(folder, dtype).state_dict()
    except Exception as error:  # noqa: BLE001 - what transformers cannot load fails in many ways
        return f"transformers cannot load it: {type(error).__name__}"
    ours = of_transformers(plain, dtype).state_dict()
    both = [name for name in ours if name in own]  # others stay packed until they are used
    same = [name for name in both if torch.equal(ours[name], own[name])]
    other = [name for name in both if name not in same]
    return f"{len(same)} of {len(both)}" + (f", not {', '.join(other[:6])}" if other else "")


def measure(folder: Path) -> dict[str, Any]:
    """Return the row of one folder."""
    skeleton = build_skeleton(folder)
    dtype = skeleton.dtype
    block, stored = skeleton.blocks[0], skeleton.stored()
    least = memory_budget(skeleton, LoadSettings(context=64)).min_bytes
    row: dict[str, Any] = {
        "family": type(skeleton.model).__name__,
        "formats": {"experts": stored.experts, "others": stored.dense},
        "expert_bytes": {"checkpoint": stored.expert_bytes, "memory": block.expert_bytes},
        "least_bytes": least,
    }
    ids_BT = torch.randint(3, 480, TOKENS, generator=torch.Generator().manual_seed(5))
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name)
        (plain / "own").mkdir()
        (plain / "wide").mkdir()
        plain_copy(skeleton, plain / "own")
        row["weights_equal_transformers"] = bit_equal_weights(folder, plain / "own", dtype)
        plain_copy(build_skeleton(folder, torch.float32), plain / "wide")
        expected, tokens = outputs(of_transformers(plain / "wide", torch.float32), ids_BT)
        shutil.rmtree(plain / "wide")
    with moefit.load(folder, dtype=torch.float32, context=64, mode="exact") as served:
        for what in ("all_in_memory", "one_slot_per_layer"):
            if what != "all_in_memory":
                served.set_memory(served.budget.total_for_slots([1] * len(served.blocks)))
            found, made = outputs(served.model, ids_BT)
            row[what] = {
                "largest_difference": float((found - expected).abs().max()),
                "largest_logit": float(expected.abs().max()),
                "greedy_tokens_equal": made == tokens,
            }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows: dict[str, Any] = {}
    for folder in arguments.folders:
        try:
            rows[folder.name] = measure(folder)
        except MoefitError as error:
            rows[folder.name] = {"refused": str(error).replace(str(folder), folder.name)}
        print(folder.name, json.dumps(rows[folder.name]), flush=True)
    if arguments.save:
        notes = "random weights, widths of 64 to 256; logits in float32 of 2 x 24 tokens, 12 new"
        print(record.write("checkpoint-table", rows, notes=notes))


if __name__ == "__main__":
    main()
