"""Write a DS-MoE as a folder that transformers opens without moefit, by `trust_remote_code=True`.

Beside the weights lies one Python file (`standalone/modeling_dsmoe.py`), which config.json names.
The written model is loaded by that file's classes, and its logits are compared with the model's
before the folder gets its final name.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefit.checkpoint.config import CONFIG
from moefit.checkpoint.model_folder import save_tokenizer
from moefit.dsmoe.block import DsMoeRouter
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.dsmoe.standalone import modeling_dsmoe
from moefit.errors import CheckpointError, UnsupportedModelError
from moefit.folders import atomic_folder

CODE = "modeling_dsmoe.py"
_CLASSES = {
    "AutoConfig": "modeling_dsmoe.DsMoeConfig",
    "AutoModelForCausalLM": "modeling_dsmoe.DsMoeForCausalLM",
}


def export_standalone(
    model: PreTrainedModel,
    out_dir: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a model with the code that opens it; the model does not change, unless to `dtype`.

    Args:
        model: The model. Its inference rule is the one that the folder has.
        out_dir: A new or empty folder.
        tokenizer: Written with the model.
        dtype: Of the written weights, to which the model is converted; None for its own.

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: It is not a DS-MoE.
        CheckpointError: `out_dir` is in use or cannot be written, or the logits differ.
    """
    if not isinstance(model, DsMoeForCausalLM):
        raise UnsupportedModelError(
            f"a {type(model).__name__} is a class of transformers, which opens it without code "
            "beside it; copy its folder, or write it as OLMoE with export_olmoe"
        )
    out_dir = Path(out_dir).resolve()
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise CheckpointError(
            f"{out_dir} exists and is not an empty folder; give a new one, or remove it first"
        )
    with atomic_folder(out_dir) as partial:
        if dtype is not None:
            _convert(model, dtype)
        model.save_pretrained(partial)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial)
        add_code(partial)
        _check_written(partial, model)
    return out_dir


def _convert(model: DsMoeForCausalLM, dtype: torch.dtype) -> None:
    """Convert weights in place; biases of choices stay in float32, as all readers have them."""
    routers = [one for one in model.modules() if isinstance(one, DsMoeRouter)]
    biases = [one.e_score_correction_bias for one in routers]
    model.to(dtype)  # pyright: ignore[reportArgumentType]
    for router, bias_E in zip(routers, biases, strict=True):
        router.e_score_correction_bias = bias_E


def add_code(folder: Path) -> None:
    """Add the code to a model folder. Raises OSError if it cannot be written."""
    shutil.copyfile(Path(modeling_dsmoe.__file__), folder / CODE)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["auto_map"] = _CLASSES
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.inference_mode()
def _check_written(folder: Path, model: DsMoeForCausalLM) -> None:
    """Raise CheckpointError unless the standalone classes compute the same logits in float32."""
    written = modeling_dsmoe.DsMoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = DsMoeForCausalLM(DsMoeConfig.from_dict(model.config.to_dict()))
    reference.load_state_dict({name: one.float() for name, one in model.state_dict().items()})
    reference.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    length = min(8, model.config.max_position_embeddings)
    ids_BT = torch.randint(model.config.vocab_size, (8, length), generator=generator)
    logits_BTV, expected_BTV = written(ids_BT).logits, reference.eval()(ids_BT).logits
    error_B = (logits_BTV - expected_BTV).abs().amax((1, 2)) / expected_BTV.abs().max()
    # Rounding may decide between experts with nearly equal scores and change a sequence.
    if (error_B <= 1e-4).float().mean() < 0.75:
        raise CheckpointError(
            f"the written model's logits differ from the original's by {error_B.median():.2g} of "
            "the largest; nothing was written. This is a bug of moefit with this version of "
            "transformers; please report it with config.json"
        )
