"""A trained model as an OLMoE checkpoint, which other engines load without any code of ours.

Owns the writing, and the proof that what lies on disk computes what the model computes. Takes our
own model, or transformers' OLMoE class after dense training. Knows nothing of training;
`olmoe.py` knows what can be represented.
"""

import copy
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerBase,
)

from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.dsmoe.olmoe import olmoe_caveats, olmoe_config
from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError
from moefit.moe.routing import Rule


def export_olmoe(
    model: DsMoeForCausalLM | OlmoeForCausalLM,
    out_dir: str | os.PathLike[str],
    *,
    experts_per_token: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `model` with K = `experts_per_token` as an OLMoE checkpoint, and give its folder.

    The model is left as it is. K replaces the K of an inference rule `top_k`; a rule's
    `renormalize` becomes `norm_topk_prob`. Tied embeddings are written twice, as some engines
    require. dtype: of the written weights; the model's own if None.

    What was written is loaded again by transformers alone: each weight must be the one that was
    meant, and the logits on random tokens those of the model under `top_k:K`, compared in
    float32 (in bfloat16 OLMoE's router rounds, ours does not). This needs memory for up to
    three more copies of the model. `out_dir` appears complete and checked, or not at all.

    Warns (UserWarning) of what vLLM or llama.cpp compute otherwise, such as an rms_norm_eps that
    is not 1e-5; see `olmoe_caveats`.

    Raises ConfigError if there are fewer than K experts or the tokenizer does not fit,
    UnsupportedModelError if OLMoE cannot represent the model, CheckpointError if `out_dir` is in
    use or cannot be written, or if the check fails.
    """
    out_dir = Path(out_dir).resolve()
    _require_model(model)
    config = olmoe_config(model.config, experts_per_token)
    _require_fitting(tokenizer, config)
    _require_unused(out_dir)
    if caveats := olmoe_caveats(config):
        message = f"not every engine will compute this model as it is: {'; '.join(caveats)}"
        warnings.warn(message, stacklevel=2)
    olmoe = _olmoe_model(model, config, dtype)
    with _whole_or_not_at_all(out_dir) as partial:
        olmoe.save_pretrained(partial)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, partial)
        _check_written(partial, olmoe, model)
    return out_dir


def _require_model(model: DsMoeForCausalLM | OlmoeForCausalLM) -> None:
    if not isinstance(model, DsMoeForCausalLM | OlmoeForCausalLM):
        raise UnsupportedModelError(
            f"a {type(model).__name__} cannot be written as OLMoE; a DsMoeForCausalLM and an "
            "OlmoeForCausalLM can (give the model itself, not a compiled or wrapped one)"
        )


def _require_fitting(tokenizer: PreTrainedTokenizerBase | None, config: OlmoeConfig) -> None:
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocab_size is "
            f"{config.vocab_size}; give the tokenizer that the model was trained with"
        )


def _require_unused(out_dir: Path) -> None:
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise CheckpointError(
            f"{out_dir} exists and is not an empty folder; give a new one, or remove it first"
        )


def _olmoe_model(
    model: DsMoeForCausalLM | OlmoeForCausalLM, config: OlmoeConfig, dtype: torch.dtype | None
) -> OlmoeForCausalLM:
    """transformers' own model object around the weights, which have the same names in both."""
    with torch.device("meta"):
        olmoe = OlmoeForCausalLM(config)
    state = {
        name: _rescaled(name, tensor.detach(), _scale(model)).to(
            device="cpu", dtype=dtype or tensor.dtype
        )
        for name, tensor in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["lm_head.weight"].clone()
    olmoe.load_state_dict(state, assign=True)
    olmoe.generation_config = copy.deepcopy(model.generation_config)
    return olmoe


def _scale(model: DsMoeForCausalLM | OlmoeForCausalLM) -> float:
    """OLMoE has no factor on its experts' weights; theirs goes into the down projections."""
    return getattr(model.config, "routed_scaling_factor", 1.0)


def _rescaled(name: str, tensor: Tensor, factor: float) -> Tensor:
    return tensor * factor if name.endswith("experts.down_proj") and factor != 1.0 else tensor


@contextmanager
def _whole_or_not_at_all(out_dir: Path) -> Iterator[Path]:
    """A folder beside `out_dir` to write into; takes its name if the block ends well."""
    partial = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(out_dir)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out_dir} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # all that the tokenizers library raises is bare Exception
        raise OSError(f"the tokenizer could not be saved ({error})") from error


def _check_written(
    folder: Path, olmoe: OlmoeForCausalLM, source: DsMoeForCausalLM | OlmoeForCausalLM
) -> None:
    """Raise CheckpointError unless `folder`, loaded by transformers alone, equals the source."""
    reloaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", trust_remote_code=False
    )
    state = {name: tensor.float() for name, tensor in olmoe.state_dict().items()}
    stored = reloaded.state_dict()
    changed = [name for name in state if not torch.equal(state[name], stored[name])]
    if changed:
        raise CheckpointError(
            f"writing and loading again changed {len(changed)} of {len(state)} weights, among "
            f"them {changed[0]}; nothing was kept. Are there NaNs in the model?"
        )
    twin = _twin(source, olmoe.config, state)
    ids = _random_tokens(olmoe.config)
    with torch.no_grad():
        error_B = _relative_error(reloaded(ids).logits, twin(ids).logits)
    # A near-tie between two experts may fall either way by rounding and change one sequence
    # visibly; a wrong norm, rule or layout changes them all by far more than 1e-4.
    if (error_B <= 1e-4).float().mean() < 0.75:
        raise CheckpointError(
            f"the written model's logits differ from the original's by {error_B.median():.2g} of "
            "the largest; nothing was kept. This is a fault of moefit with this version of "
            "transformers, please report it with config.json"
        )


def _twin(
    source: DsMoeForCausalLM | OlmoeForCausalLM, config: OlmoeConfig, state: dict[str, Tensor]
) -> DsMoeForCausalLM | OlmoeForCausalLM:
    """The source's own class with K experts per token, in float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):  # its initial weights must not cost the caller's seed
        if isinstance(source, OlmoeForCausalLM):
            twin = OlmoeForCausalLM(copy.deepcopy(config))
        else:
            k, renormalize = config.num_experts_per_tok, config.norm_topk_prob
            twin = DsMoeForCausalLM(copy.deepcopy(source.config))
            twin.set_inference_rule(Rule(kind="top_k", k=k, renormalize=renormalize))
    state = {name: _rescaled(name, tensor, 1 / _scale(source)) for name, tensor in state.items()}
    twin.set_experts_implementation("eager")
    twin.load_state_dict(state, assign=True)
    return twin.eval()


def _random_tokens(config: OlmoeConfig) -> Tensor:
    length = min(8, config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (16, length), generator=generator)


def _relative_error(logits_BTV: Tensor, expected_BTV: Tensor) -> Tensor:
    """Of each sequence the largest difference, relative to the largest logit of all."""
    return (logits_BTV - expected_BTV).abs().amax((1, 2)) / expected_BTV.abs().max()
