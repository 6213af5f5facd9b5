"""Does moefit compute what transformers computes, for checkpoints of many kinds and formats?

For each model folder or GGUF file: the decoded weights are written as a plain checkpoint, which
transformers loads and computes, in float32 and in the model's own dtype. moefit serves the
checkpoint itself, with all experts in memory and with one slot per layer, and is compared in logits
and greedy tokens: in float32, where experts are decoded, and in the own dtype, where slots hold the
checkpoint's codes if there are kernels for them. In 16 bits some tokens have another expert chosen
than in float32, by transformers too; so there the mean difference of logits is compared with that
of transformers. Where transformers can load the quantised folder too, the
decoded weights are compared with its own, bit by bit. Needs accelerate, and compressed-tensors for
that format.

    python benchmarks/checkpoint_table.py MODEL [MODEL ...] [--save]
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import record
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import moefit
from moefit.checkpoint.config import read_config
from moefit.checkpoint.formats.declared import declared
from moefit.errors import MoefitError
from moefit.folders import is_gguf
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import Skeleton, build_skeleton, held_formats
from moefit.serve.memory.estimate import memory_budget

READ_BY_TRANSFORMERS = ("fp8", "mxfp4", "compressed-tensors")  # without further libraries
TOKENS, NEW = (2, 48), 12


def plain_copy(skeleton: Skeleton, folder: Path) -> Path:
    """Write the decoded weights, and the configuration without its declaration."""
    folder.mkdir()
    checkpoint = skeleton.checkpoint
    left = set(skeleton.map.unused)
    tensors = {n: checkpoint.tensor(one) for n, one in checkpoint.weights.items() if n not in left}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(read_config(checkpoint.folder)))
    return folder


def of_transformers(kind: str, folder: Path, dtype: torch.dtype) -> Any:
    return getattr(transformers, kind).from_pretrained(folder, dtype=dtype).eval()


def outputs(model: Any, ids_BT: Tensor) -> tuple[Tensor, list[int]]:
    encoded = {"decoder_input_ids": ids_BT[:, :8]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        logits = model(input_ids=ids_BT, **encoded).logits.float()
        made = model.generate(
            input_ids=ids_BT[:1],
            attention_mask=torch.ones_like(ids_BT[:1]),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return logits, made[0, -NEW:].tolist()


def bit_equal_weights(kind: str, folder: Path, plain: Path, dtype: torch.dtype) -> str:
    """Compare transformers' own loading of both folders, in the weights that it dequantises."""
    found = None if is_gguf(folder) else declared(folder)
    if found is None or found.method not in READ_BY_TRANSFORMERS:
        return "not quantised" if found is None else "not read by transformers"
    try:
        own = of_transformers(kind, folder, dtype).state_dict()
    except Exception as error:  # noqa: BLE001 - what transformers cannot load fails in many ways
        return f"transformers cannot load it: {type(error).__name__}"
    ours = of_transformers(kind, plain, dtype).state_dict()
    both = [name for name in ours if name in own]  # others stay packed until they are used
    same = [name for name in both if torch.equal(ours[name], own[name])]
    other = [name for name in both if name not in same]
    return f"{len(same)} of {len(both)}" + (f", not {', '.join(other[:6])}" if other else "")


def mean_difference(logits_BTV: Tensor, expected_BTV: Tensor) -> float:
    return float((logits_BTV - expected_BTV).abs().mean())


def compare(
    folder: Path, dtype: torch.dtype, ids_BT: Tensor, expected_BTV: Tensor, tokens: list[int]
) -> dict[str, Any]:
    """Serve a model with all experts in memory, then with one slot per layer."""
    found: dict[str, Any] = {}
    with moefit.load(folder, dtype=dtype, context=128, mode="exact") as served:
        found["formats_held"] = list(held_formats(one.block for one in served.blocks.values()))
        for what in ("all_in_memory", "one_slot_per_layer"):
            if what != "all_in_memory":
                served.set_memory(served.budget.total_for_slots([1] * len(served.blocks)))
            logits_BTV, made = outputs(served.model, ids_BT)
            found[what] = {
                "largest_difference": float((logits_BTV - expected_BTV).abs().max()),
                "mean_difference": mean_difference(logits_BTV, expected_BTV),
                "greedy_tokens_equal": made == tokens,
            }
    return found


def measure(folder: Path) -> dict[str, Any]:
    """Return the row of one model."""
    skeleton = build_skeleton(folder)
    dtype, kind, stored = skeleton.dtype, type(skeleton.model).__name__, skeleton.stored()
    budget = memory_budget(skeleton, LoadSettings(context=128))
    slot = max(block.slot_bytes for block in budget.blocks)
    row: dict[str, Any] = {
        "family": kind,
        "formats": {"experts": stored.experts, "held": stored.held, "others": stored.dense},
        "expert_bytes": {"checkpoint": stored.expert_bytes, "slot": slot},
        "least_bytes": budget.min_bytes,
    }
    most = skeleton.model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(5)
    ids_BT = torch.randint(3, min(480, most), TOKENS, generator=generator)
    with tempfile.TemporaryDirectory() as name:
        own = plain_copy(skeleton, Path(name) / "own")
        row["weights_equal_transformers"] = bit_equal_weights(kind, folder, own, dtype)
        logits_BTV, tokens = outputs(of_transformers(kind, own, dtype), ids_BT)
        wide = plain_copy(build_skeleton(folder, torch.float32), Path(name) / "wide")
        expected_BTV, wide_tokens = outputs(of_transformers(kind, wide, torch.float32), ids_BT)
    row["largest_logit"] = float(expected_BTV.abs().max())
    row["float32"] = compare(folder, torch.float32, ids_BT, expected_BTV, wide_tokens)
    row["own_dtype"] = {
        "dtype": str(dtype).removeprefix("torch."),
        "transformers_mean_difference": mean_difference(logits_BTV, expected_BTV),
        **compare(folder, dtype, ids_BT, expected_BTV, tokens),
    }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows: dict[str, Any] = {}
    for folder in arguments.models:
        try:
            rows[folder.name] = measure(folder)
        except MoefitError as error:
            rows[folder.name] = {"refused": str(error).replace(str(folder), folder.name)}
        print(folder.name, json.dumps(rows[folder.name]), flush=True)
    if arguments.save:
        notes = (
            "random weights, widths of 64 to 256; logits of 2 x 48 tokens against transformers in "
            "float32, 12 new tokens against transformers in the same dtype"
        )
        print(record.write("checkpoint-table", rows, notes=notes))


if __name__ == "__main__":
    main()
