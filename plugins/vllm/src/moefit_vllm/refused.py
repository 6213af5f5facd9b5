"""What the plugin refuses, in plain Python: this module does not import vLLM."""

from typing import Any


def refuse_untested(config: Any, vllm_config: Any) -> None:
    """Check that the plugin computes a model as moefit does.

    Args:
        config: `DsMoeConfig` of the model.
        vllm_config: vLLM's `VllmConfig`.

    Raises:
        ValueError: The model or vLLM's settings are none that the plugin has been tested with.
    """
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "data_parallel_size"):
        count = getattr(parallel, name)
        if count > 1:
            raise ValueError(
                f"{name}={count}: DS-MoE in vLLM is not tested with it; give 1, or "
                "tensor_parallel_size"
            )
    if parallel.enable_expert_parallel:
        raise ValueError(
            "enable_expert_parallel=True: DS-MoE in vLLM is not tested with it; leave it out, or "
            "give tensor_parallel_size"
        )
    if vllm_config.quant_config is not None:
        raise ValueError("DS-MoE in vLLM computes in 16 or 32 bits; leave quantization out")
    if config.router_type != "linear":
        raise ValueError(f"router_type={config.router_type!r}; DS-MoE in vLLM has 'linear' routers")
    if config.score_correction_bias:
        raise ValueError(
            "score_correction_bias=True: the plugin's routers choose by scores alone; serve the "
            "model with `moefit serve`"
        )
    if config.pregated:
        before = "block" if config.pregated is True else "token"
        raise ValueError(
            f"pregated={config.pregated}: the plugin's routers are given their own block's inputs "
            f"of the token that is routed, and this model's those of the {before} before; serve it "
            "with `moefit serve`"
        )
    parts = parallel.tensor_parallel_size
    for name in ("num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % parts:
            raise ValueError(
                f"tensor_parallel_size={parts} does not divide {name}={getattr(config, name)}; "
                "give a number that does, such as 1"
            )
