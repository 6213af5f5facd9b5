"""The layer for multi-token prediction (MTP) that DeepSeek-V3, GLM-4.5 and their kin ship.

Their checkpoints have one decoder layer more than config.json says. It is given the hidden state of
a token and the embedding of the next one, and predicts the token after that, with the model's own
embedding and head. transformers does not load it. Here the model is built with one layer more,
which its forward pass leaves out, so that everything else (estimate, slots, kernels, formats) knows
it as a layer like any other.

Shapes: B sequences, T tokens, D model width.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefit.errors import UnsupportedModelError

MTP_TOKENS = 256
"""Most hidden states that are held of a request until its next draft, the last ones."""
_LAYERS = "num_hidden_layers"


def one_layer_more(
    values: Mapping[str, Any], tensors: Collection[str], folder: Path
) -> dict[str, Any]:
    """Return the values of config.json with the layer for multi-token prediction.

    Args:
        values: Of config.json.
        tensors: Names in the checkpoint.
        folder: Of the checkpoint, for the error.

    Raises:
        UnsupportedModelError: The checkpoint has no such layer.
    """
    layers = values.get(_LAYERS)
    if not isinstance(layers, int) or f"model.layers.{layers}.eh_proj.weight" not in tensors:
        raise UnsupportedModelError(
            f"{folder} has no layer for multi-token prediction of the form of DeepSeek-V3 and "
            f"GLM-4.5 (model.layers.{layers}.eh_proj.weight); use --speculate ngram, or "
            "draft:MODEL with a smaller model"
        )
    return {**values, _LAYERS: layers + 1}


def make_last_layer_mtp(model: PreTrainedModel) -> None:
    """Give the last layer of a model on the meta device what only such a layer has.

    The model's forward pass computes the layers before it, since its configuration says so.
    """
    config, layer = cast(Any, model.config), _last_layer(model)
    norm, width = type(layer.input_layernorm), config.hidden_size
    with torch.device("meta"):
        for name in ("enorm", "hnorm"):
            layer.add_module(name, norm(width, eps=config.rms_norm_eps).to(model.dtype))
        projection = nn.Linear(2 * width, width, bias=False, dtype=model.dtype)
        head = nn.Module()
        head.add_module("norm", norm(width, eps=config.rms_norm_eps).to(model.dtype))
    layer.add_module("eh_proj", projection)
    layer.add_module("shared_head", head)
    config.num_hidden_layers -= 1


def has_mtp(model: PreTrainedModel) -> bool:
    """Return whether a model was loaded with the layer."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    return layers is not None and len(layers) > 0 and hasattr(layers[-1], "eh_proj")


def is_of_mtp(model: PreTrainedModel, name: str) -> bool:
    """Return whether a module, a weight or a tensor of the checkpoint is of that layer."""
    return has_mtp(model) and name.startswith(
        f"model.layers.{cast(Any, model.config).num_hidden_layers}."
    )


class MtpLayer:
    """The layer of a loaded model.

    Args:
        model: A model with the layer.
    """

    def __init__(self, model: PreTrainedModel):
        self._model, self._layer = model, _last_layer(model)
        self._base: Any = model.model

    def hidden_1TD(self, states_1TD: Tensor, ids_1T: Tensor, positions_1T: Tensor, **how: Any):
        """Return the layer's output [1, T, D], which the next draft's state may be.

        Args:
            states_1TD: Hidden states of tokens.
            ids_1T: The tokens after these.
            positions_1T: Positions of the former.
            how: Further arguments of the layer: cache, mask and the like.
        """
        embedded = self._base.embed_tokens(ids_1T)
        both = torch.cat([self._layer.enorm(embedded), self._layer.hnorm(states_1TD)], dim=-1)
        x_1TD = self._layer.eh_proj(both)
        rotated = self._base.rotary_emb(x_1TD, positions_1T)
        output = self._layer(
            x_1TD, position_ids=positions_1T, position_embeddings=rotated, use_cache=True, **how
        )
        return output[0] if isinstance(output, tuple) else output

    def logits(self, output_ND: Tensor) -> Tensor:
        """Return the logits of the next token but one [N, V]."""
        return self._model.lm_head(self._layer.shared_head.norm(output_ND))

    def follow(self, see: Callable[[Tensor], None]) -> Callable[[], None]:
        """Call `see` with the hidden states of each forward pass; return what ends that."""
        handle = self._base.norm.register_forward_hook(lambda _m, _i, output: see(output))
        return handle.remove


def _last_layer(model: PreTrainedModel) -> Any:
    return cast(Any, model).model.layers[-1]
