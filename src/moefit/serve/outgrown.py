"""When a model or its requests outgrow one machine, and the line that serves it with vLLM.

Decisions in plain Python: `moefit serve` prints their lines and does nothing else about them.
"""

import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from moefit.checkpoint.model_folder import read_json_or_empty
from moefit.dsmoe.config import DsMoeConfig
from moefit.moe.routing import Rule
from moefit.serve.memory.budget import format_bytes

GPU_BYTES = 80 * 10**9
"""Of the GPUs that a line is written for; H100 and A100 have as much."""
GPUS_PER_MACHINE = 8
WEIGHTS_SHARE = 0.7
"""Part of a GPU's memory for weights; of the rest vLLM leaves a tenth and holds the KV cache."""
PATIENCE = 60.0  # seconds for which requests wait before a backlog is one
SILENCE = 3600.0  # seconds between two lines about it
_PAGE = "the page on scaling in moefit's documentation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What vLLM would serve.

    Attributes:
        name: As on the command line.
        weight_bytes: Of the checkpoint, as it is on disk.
        is_dsmoe: Whether vLLM needs moefit's plugin for it.
        is_gguf: Whether it is a GGUF file.
        kv_heads: `num_key_value_heads` of a DS-MoE, which tensor parallelism divides.
        expert_width: `intermediate_size` of a DS-MoE, likewise.
        refused: Why the plugin does not compute the model, whatever the number of GPUs.
    """

    name: str
    weight_bytes: int
    is_dsmoe: bool = False
    is_gguf: bool = False
    kv_heads: int = GPUS_PER_MACHINE
    expert_width: int = GPUS_PER_MACHINE
    refused: str = ""


def subject_of(name: str, path: Path) -> Subject:
    """Return what vLLM would serve in place of a model.

    Args:
        name: As on the command line.
        path: Its folder or file.
    """
    settings = read_json_or_empty(path / "config.json") if path.is_dir() else {}
    nbytes = weight_bytes(path)
    if settings.get("model_type") != DsMoeConfig.model_type:
        return Subject(name=name, weight_bytes=nbytes, is_gguf=path.suffix == ".gguf")
    config = DsMoeConfig.from_dict(settings)
    return Subject(
        name=name,
        weight_bytes=nbytes,
        is_dsmoe=True,
        kv_heads=config.num_key_value_heads or 1,
        expert_width=config.intermediate_size,
        refused=_refused(config),
    )


def _refused(config: DsMoeConfig) -> str:
    """Return why the plugin refuses a model on any number of GPUs; empty if it does not."""
    if Rule.parse(config.inference_rule).kind == "threshold_top_k":
        return (
            f"inference_rule={config.inference_rule}, whose number of experts depends on which "
            "requests share a step"
        )
    if config.router_type != "linear":
        return f"router_type={config.router_type}"
    if config.score_correction_bias:
        return "score_correction_bias=true, routers that choose by more than their scores"
    if config.pregated:
        before = "token" if config.by_token_before else "block"
        value = str(config.pregated).lower()
        return f"pregated={value}, routers that are given the inputs of the {before} before"
    return ""


def weight_bytes(path: Path) -> int:
    """Return the bytes of a checkpoint: of the weight files in a folder, or of one file."""
    if path.is_file():
        return path.stat().st_size
    return sum(
        file.stat().st_size
        for file in path.glob("*")
        if file.suffix in (".safetensors", ".gguf") and file.is_file()
    )


def gpus_for(nbytes: int) -> tuple[int, int]:
    """Return on how many GPUs of a machine, and how many machines, weights of a size fit.

    GPUs of a machine are powers of two, since they divide attention heads.

    >>> gpus_for(14 * 10**9), gpus_for(100 * 10**9), gpus_for(1340 * 10**9)
    ((1, 1), (2, 1), (8, 3))
    """
    per_gpu = WEIGHTS_SHARE * GPU_BYTES
    gpus = 1
    while gpus < GPUS_PER_MACHINE and gpus * per_gpu < nbytes:
        gpus *= 2
    machines = max(1, -int(-nbytes // (gpus * per_gpu)))
    return gpus, machines


def plugin_gpus(subject: Subject) -> int | None:
    """Return over how many GPUs of a machine the plugin divides a DS-MoE; None if it cannot.

    It has tensor parallelism only, by numbers that divide the KV heads and the experts' width.

    >>> plugin_gpus(Subject(name="a", weight_bytes=100 * 10**9, kv_heads=6, expert_width=96))
    2
    """
    common = math.gcd(subject.kv_heads, subject.expert_width)
    for gpus in range(1, GPUS_PER_MACHINE + 1):
        if common % gpus == 0 and subject.weight_bytes <= gpus * WEIGHTS_SHARE * GPU_BYTES:
            return gpus
    return None


def plugin_refusal(subject: Subject) -> str:
    """Return why moefit's plugin for vLLM does not serve a DS-MoE; empty if it does."""
    if subject.refused or plugin_gpus(subject) is not None:
        return subject.refused
    gpus, machines = gpus_for(subject.weight_bytes)
    return (
        f"its weights need {gpus * machines} GPUs, and the plugin divides a model over the GPUs of "
        f"one machine, by a divisor of num_key_value_heads={subject.kv_heads} and "
        f"intermediate_size={subject.expert_width}"
    )


def vllm_line(subject: Subject) -> str | None:
    """Return the shell command that serves a model with vLLM, on GPUs of 80 GB.

    Returns:
        None for a DS-MoE that `plugin_refusal` gives a reason for.

    >>> vllm_line(Subject(name="allenai/OLMoE-1B-7B-0924", weight_bytes=14 * 10**9))
    'vllm serve allenai/OLMoE-1B-7B-0924'
    """
    name = shlex.quote(subject.name)
    if subject.is_dsmoe:
        if plugin_refusal(subject):
            return None
        gpus = plugin_gpus(subject) or 1
        parts = f" --tensor-parallel-size {gpus}" if gpus > 1 else ""
        return f"moefit export {name} OUT --format dsmoe && vllm serve OUT{parts}  # moefit-vllm"
    gpus, machines = gpus_for(subject.weight_bytes)
    if subject.is_gguf:
        name = "MODEL"  # the safetensors that the file was made of
    line = f"vllm serve {name}"
    if gpus > 1:
        line += f" --tensor-parallel-size {gpus} --enable-expert-parallel"
    if machines > 1:
        line += f" --pipeline-parallel-size {machines}"
    return line


def _beyond(subject: Subject) -> str:
    line = vllm_line(subject)
    if line is None:
        reason = plugin_refusal(subject)
        return f"moefit's plugin for vLLM does not serve this: {reason}; see {_PAGE}"
    needs = f" (the safetensors of {subject.name})" if subject.is_gguf else ""
    return f"past one machine, on GPUs of 80 GB: {line}{needs}; see {_PAGE}"


def size_line(subject: Subject, needed: int, machine: int) -> str | None:
    """Return what to say if a model does not fit in the memory of a machine as a whole.

    Args:
        subject: The model.
        needed: Bytes of the process with all experts in memory.
        machine: Bytes of memory of the machine, or of the process's control group.
    """
    if needed <= machine:
        return None
    return (
        f"note: all experts would take {format_bytes(needed)}, and this machine has "
        f"{format_bytes(machine)}, so some are read or replaced as requests need them; "
        f"{_beyond(subject)}"
    )


def unfit_line(subject: Subject, machine: int) -> str | None:
    """Return what to add to the error of a budget that is too small, if the machine is too."""
    if subject.weight_bytes <= machine:
        return None
    return (
        f"note: the checkpoint has {format_bytes(subject.weight_bytes)}, and this machine "
        f"{format_bytes(machine)} of memory; {_beyond(subject)}"
    )


def slow_line(subject: Subject) -> str:
    """Return what to add to the error of a target that no plan reaches on this machine."""
    return f"note: if no budget of this machine reaches that, {_beyond(subject)}"


class Backlog:
    """Notices requests that arrive faster than they are answered.

    Args:
        subject: The model.
    """

    def __init__(self, subject: Subject):
        self._subject = subject
        self._since: tuple[float, int] | None = None  # when the queue began, and its length
        self._quiet_until = float("-inf")

    def observe(self, now: float, waiting: int, tokens_per_second: float) -> str | None:
        """Return a line once requests have waited for a minute and the queue is not shorter.

        Args:
            now: Seconds of a clock that never goes back.
            waiting: Requests in the queue.
            tokens_per_second: That are generated.
        """
        if waiting == 0:
            self._since = None
            return None
        began, first = self._since or (now, waiting)
        self._since = began, first
        if now - began < PATIENCE:
            return None
        self._since = now, waiting
        if waiting < first or now < self._quiet_until:
            return None
        self._quiet_until = now + SILENCE
        return (
            f"note: requests arrive faster than they are answered: {waiting} have been waiting, "
            f"and {tokens_per_second:.1f} tokens/s are generated; {_beyond(self._subject)}"
        )
