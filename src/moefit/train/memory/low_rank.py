"""Train changes of low rank in place of the experts' weights (LoRA, arXiv 2106.09685).

Each matrix W of an expert computes as W + L @ R. W stays as it is and only L and R are trained, so
that gradients that are kept and the optimizer's moments are those of few numbers. Checkpoints hold
the sums, in the model's own format, and L and R beside them, with which a run resumes.

Shapes: E experts, I rows (output units), C columns, K rank.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from moefit.errors import CheckpointError, ConfigError

_MATRICES = ("gate_up_proj", "up_proj", "down_proj")
_PART = ".parametrizations."  # of the name of W, L and R; torch chooses it
_ORIGINAL = ".original"


class LowRankChange(nn.Module):
    """The change of one stacked matrix: none at first.

    Args:
        weights_EIC: The matrix of each expert.
        rank: K.
        generator: Of the first values of R. Their variance is 1 / K, so that a step moves a weight
            about as far as it would move it with all weights trained at the same rate.
    """

    def __init__(self, weights_EIC: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        experts, rows, columns = weights_EIC.shape
        right_EKC = torch.randn(experts, rank, columns, generator=generator) / math.sqrt(rank)
        self.left_EIK = nn.Parameter(torch.zeros(experts, rows, rank))
        self.right_EKC = nn.Parameter(right_EKC)

    def forward(self, weights_EIC: Tensor) -> Tensor:
        """Return the changed weights."""
        return weights_EIC + self.left_EIK @ self.right_EKC


def add_low_rank(model: PreTrainedModel, rank: int, seed: int) -> None:
    """Freeze the experts of a model and give each of their matrices a change of low rank.

    Args:
        model: A DS-MoE or an OLMoE on the CPU with its initial weights.
        rank: K.
        seed: Of the first values.

    Raises:
        ConfigError: The rank is not below that of the matrices.
    """
    found = [
        (module, name)
        for path, module in model.named_modules()
        if path.endswith("experts")
        for name in _MATRICES
        if isinstance(getattr(module, name, None), nn.Parameter)
    ]
    most = min(min(getattr(module, name).shape[1:]) for module, name in found) - 1
    if rank > most:
        raise ConfigError(
            f"rank={rank} saves nothing for experts whose smaller side is {most + 1}; the most "
            f"that works is {most}, or give trainable=all"
        )
    generator = torch.Generator().manual_seed(seed)
    for module, name in found:
        weights_EIC = getattr(module, name)
        weights_EIC.requires_grad = False
        change = LowRankChange(weights_EIC, rank, generator)
        parametrize.register_parametrization(module, name, change)


def factors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return L and R of all matrices by name; nothing for other models."""
    named = model.state_dict().items()
    return {name: one for name, one in named if _PART in name and not name.endswith(_ORIGINAL)}


@torch.no_grad()
def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with changed weights in place of weights and changes.

    What does not change is shared with the model. Other models are returned as they are.
    """
    if not _changed_matrices(model):
        return model
    with torch.device("meta"):
        whole = type(model)(model.config)
    state = {name: one for name, one in model.state_dict().items() if _PART not in name}
    whole.load_state_dict(state | _sums(model), assign=True)
    whole.tie_weights()
    for name, buffer in model.named_buffers():  # also those that are not saved
        path, _, own = name.rpartition(".")
        setattr(whole.get_submodule(path), own, buffer)
    return whole


@torch.no_grad()
def load_trained(
    model: PreTrainedModel, whole: Mapping[str, Tensor], changes: Mapping[str, Tensor]
) -> None:
    """Restore what `merged` and `factors` returned, into a model with its initial weights.

    Args:
        model: With changes of low rank.
        whole: Weights of the merged model.
        changes: L and R.

    Raises:
        CheckpointError: The initial weights have changed since.
        RuntimeError: The tensors are of another model.
    """
    matrices = _changed_matrices(model)
    own = {name: one for name, one in model.state_dict().items() if name.endswith(_ORIGINAL)}
    rest = {name: one for name, one in whole.items() if name not in matrices}
    model.load_state_dict({**own, **rest, **changes})
    for name, sum_EIC in _sums(model).items():
        # Another processor may round the products differently.
        if not torch.allclose(sum_EIC, whole[name].to(sum_EIC), rtol=1e-3, atol=1e-5):
            raise CheckpointError(
                f"{name} of the checkpoint is not what start_from and the trained change add up "
                "to, so the weights in start_from have changed since; restore them, or start a new "
                "run with out=FOLDER"
            )


def _changed_matrices(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the modules with changes, and the name in the module, by name in the model."""
    return {
        f"{path}.{name}": (module, name)
        for path, module in model.named_modules()
        if isinstance(found := getattr(module, "parametrizations", None), nn.ModuleDict)
        for name in found
    }


def _sums(model: nn.Module) -> dict[str, Tensor]:
    matrices = _changed_matrices(model).items()
    return {name: getattr(module, own).detach() for name, (module, own) in matrices}
