"""Put kernels in place of what the modules of a model compute, wherever they know it.

Each kind of operation is recognised by its own module (`hf/`, `layer/`); here is their order, which
matters: whole layers are recognised by what the operations within them have become.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from transformers import PreTrainedModel

from moefit.quant.cpu_kernels import NATIVE_DTYPES
from moefit.serve.hf.activations import use_activation_kernels
from moefit.serve.hf.attention import (
    INT8_NAME,
    LATENT_NAMES,
    NAME,
    register_int8_attention,
    use_kernels,
)
from moefit.serve.hf.latent import use_latent_kernels
from moefit.serve.hf.native_linear import use_linear_kernels
from moefit.serve.hf.norms import use_norm_kernels
from moefit.serve.hf.rotary import use_rotary_kernels
from moefit.serve.layer.layer_probe import use_layer_kernels
from moefit.serve.layer.moe_layer import VirtualExperts
from moefit.serve.layer.router_kernels import use_router_kernels

Undo = Callable[[], None]
Dry = Callable[[], AbstractContextManager[None]]


def put_kernels_in_place(
    model: PreTrainedModel,
    blocks: Mapping[str, VirtualExperts],
    context: int | None,
    *,
    int8: bool,
    dry: Dry,
) -> tuple[Undo, ...]:
    """Replace what kernels can compute.

    Args:
        model: A loaded model.
        blocks: Its served experts.
        context: Most tokens of a sequence; None without a limit.
        int8: Whether the KV cache is int8.
        dry: A context in which experts return zeros, so that trial runs read and count nothing.

    Returns:
        Functions that undo it, to be called in this order.
    """
    dtype = model.dtype
    undo = (
        use_kernels(model, int8=int8),
        use_linear_kernels(model),
        _use_latent_kernels(model, dry),
        use_norm_kernels(model, dtype),
        use_rotary_kernels(model, dtype),
        use_activation_kernels(model, dtype),
        use_router_kernels(model, blocks, dtype),
    )
    with dry():
        return use_layer_kernels(model, dtype, context), *undo


def _use_latent_kernels(model: PreTrainedModel, dry: Dry) -> Undo:
    """Attend to cached latents where kernels attend; return a function that undoes it."""
    if model.config._attn_implementation != NAME or model.dtype not in NATIVE_DTYPES:
        return lambda: None
    register_int8_attention()
    with dry():
        return use_latent_kernels(model, model.dtype, INT8_NAME, LATENT_NAMES)
