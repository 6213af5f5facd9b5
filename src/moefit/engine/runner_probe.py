"""Choose the runner of a model by comparing logits.

Runs two token sequences together, in chunks and then token by token, and compares the logits with
the model's own forward pass over each. Experts return zeros meanwhile, so that nothing is read,
moved or counted; they process tokens independently of batching. What short sequences cannot show is
read from the configuration: position embeddings that change with length, and routing rules that
depend on the batch. `prepared` also finds what may change an answer beside others (`invariance`).

Shapes: T tokens, V vocabulary.
"""

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefit.engine.api import EngineSettings
from moefit.engine.invariance import Invariance, StepSizes, Uncovered, find_uncovered
from moefit.engine.runners import Runner, RunnerInput, SeparateRunner, VarlenRunner
from moefit.engine.varlen import register_varlen_attention
from moefit.serve.hf.kv_cache import INT8_TOLERANCE
from moefit.serve.memory.activations import needs_whole_prompts
from moefit.serve.model import ServedModel

_LOG = logging.getLogger(__name__)
_LENGTHS, _DECODED = (13, 9), 3
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def choose_runner(served: ServedModel, places: int, *, packed: bool = True) -> Runner:
    """Return the fastest runner that reproduces the model's logits.

    Args:
        served: Loaded model.
        places: Tokens that the KV pool holds.
        packed: Whether requests may share a forward pass.

    Returns:
        A `VarlenRunner` if its logits equal the model's own up to rounding, otherwise a
            `SeparateRunner`.
    """
    model = served.model
    texts = _texts(model, places)
    with torch.inference_mode(), served.zero_experts():
        reason = _varlen_obstacle(model.config) if packed else "each is to be computed alone"
        if reason is None:
            register_varlen_attention()
            runner, reason = _varlen_runner(model, places, texts, int8=served.int8_cache)
            if reason is None:
                return runner
        _LOG.info("%s: requests are computed one at a time: %s", type(model).__name__, reason)
        whole = needs_whole_prompts(model.config)
        if not whole:
            tolerance = _tolerance(model.dtype, int8=served.int8_cache)
            separate = SeparateRunner(model, whole_prompts=False)
            whole = _difference(separate, texts, tolerance) is not None
        return SeparateRunner(model, whole_prompts=whole)


def prepared(
    served: ServedModel, settings: EngineSettings, places: int, longest: int
) -> tuple[Runner, Invariance]:
    """Return the runner of a model, and what its answers depend on.

    Args:
        served: Loaded model.
        settings: Of the engine.
        places: Tokens that the KV pool holds.
        longest: Tokens of the longest request.

    Raises:
        ConfigError: Answers are to be deterministic, but the mode in force is not exact.
    """
    if settings.deterministic:
        served.make_deterministic()
    runner = choose_runner(served, places)
    step = longest if runner.whole_prompts else settings.step_tokens
    sizes = StepSizes(tokens=step, threads=torch.get_num_threads())
    found = uncovered_operations(served, runner, places, sizes)
    if found and settings.deterministic and not isinstance(runner, SeparateRunner):
        runner = choose_runner(served, places, packed=False)
    return runner, Invariance(not_covered=found, deterministic=settings.deterministic)


def uncovered_operations(
    served: ServedModel, runner: Runner, places: int, sizes: StepSizes
) -> tuple[Uncovered, ...]:
    """Return the operations with which other requests may change an answer.

    Args:
        served: Loaded model.
        runner: That computes its requests.
        places: Tokens that the KV pool holds.
        sizes: How large steps become.
    """
    texts = _texts(served.model, places)

    def run() -> object:
        with torch.inference_mode(), served.zero_experts():
            return _run_in_chunks(runner, texts)

    return find_uncovered(served.model, served.blocks.values(), served.model.device, sizes, run)


def _varlen_runner(
    model: PreTrainedModel, places: int, texts: Sequence[Sequence[int]], *, int8: bool
) -> tuple[VarlenRunner, str | None]:
    """Return a runner for variable-length batches, and why it cannot be used, or None.

    For an int8 cache, the same runner with the model's dtype is tried first: rounding would hide
    small differences.
    """
    exact = _tolerance(model.dtype, int8=False)
    runner = VarlenRunner(model, sum(map(len, texts)) if int8 else places)
    if (reason := _difference(runner, texts, exact)) is not None:
        return runner, reason
    runner.settle()
    if (reason := _difference(runner, texts, exact)) is not None or not int8:
        return runner, reason
    rounded = VarlenRunner(model, places, int8=True)
    rounded.settle()
    if runner.cache.gather:
        return rounded, "it changes cached keys or values before attention"
    return rounded, _difference(rounded, texts, _tolerance(model.dtype, int8=True))


def _tolerance(dtype: torch.dtype, *, int8: bool) -> float:
    return INT8_TOLERANCE if int8 else _TOLERANCE.get(dtype, 1e-3)


def _texts(model: PreTrainedModel, places: int) -> list[list[int]]:
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    scale = min(1.0, places / (sum(_LENGTHS) + 2 * _DECODED))
    lengths = [max(1, int((length + _DECODED) * scale)) for length in _LENGTHS]
    low = min(3, vocabulary - 1)  # the first ids are often padding and other special tokens
    return [torch.randint(low, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def _varlen_obstacle(config: Any) -> str | None:
    """Return why the configuration rules out variable-length batches, or None."""
    if config.is_encoder_decoder:
        return "it has an encoder"
    if needs_whole_prompts(config):
        return "its routing rule counts experts over all tokens of a batch"
    rope = _rope_types(config.get_text_config(decoder=True).to_dict().get("rope_parameters"))
    if changing := rope & {"dynamic", "longrope"}:
        return f"its position embeddings ({', '.join(changing)}) depend on the longest sequence"
    return None


def _rope_types(parameters: Any) -> set[str]:
    """Return the RoPE types of all layers, which may differ."""
    if not isinstance(parameters, dict):
        return set()
    found = {str(parameters["rope_type"])} if "rope_type" in parameters else set[str]()
    return found.union(*(_rope_types(one) for one in parameters.values()))


def _difference(runner: Runner, texts: Sequence[Sequence[int]], tolerance: float) -> str | None:
    """Return how a runner's logits differ from the model's own; None if equal up to rounding."""
    device = runner.model.device
    try:
        outputs = _run_in_chunks(runner, texts)
    except Exception as error:  # noqa: BLE001 - any error in a family's code
        return f"{type(error).__name__}: {error}"
    for text, phases in zip(texts, outputs, strict=True):
        ids_1T = torch.tensor([text], device=device)
        own_TV = runner.model(input_ids=ids_1T, use_cache=False).logits[0]
        for end, rows in phases:
            error = _relative_error(rows, own_TV[end - len(rows) : end])
            if error > tolerance:
                return f"logits of token {end} differ by {error:.1e} of the largest"
    return None


def _run_in_chunks(
    runner: Runner, texts: Sequence[Sequence[int]]
) -> list[list[tuple[int, Tensor]]]:
    """Return each sequence's logits as pairs of end position and rows.

    Prompts are computed in chunks beside each other, or whole where the runner wants them so, then
    decoded. The second sequence begins one step later, so that one decodes while the other is in
    prefill.
    """
    cut = _whole_prompt if runner.whole_prompts else _cuts
    plans = [[(0, 0, 0)] * number + cut(len(text)) for number, text in enumerate(texts)]
    outputs: list[list[tuple[int, Tensor]]] = [[] for _ in texts]
    for number, text in enumerate(texts):
        runner.open(str(number), len(text))
    try:
        for step in range(max(map(len, plans))):
            parts = [(n, plan[step]) for n, plan in enumerate(plans) if step < len(plan)]
            inputs = [
                (
                    n,
                    RunnerInput(
                        request=str(n),
                        tokens=texts[n][begin:end],
                        past=begin,
                        num_logits=num_logits,
                    ),
                )
                for n, (begin, end, num_logits) in parts
                if end
            ]
            logits_NV = runner.step([one for _, one in inputs])
            rows = logits_NV.split([one.num_logits for _, one in inputs])
            for (number, one), logits in zip(inputs, rows, strict=True):
                outputs[number].append((one.past + len(one.tokens), logits.clone()))
    finally:
        for number in range(len(texts)):
            runner.close(str(number))
    return outputs


def _cuts(length: int) -> list[tuple[int, int, int]]:
    """Return (start, stop, number of logits): a prompt in three chunks, then single tokens."""
    prompt = max(1, length - _DECODED)
    thirds = {prompt * part // 3 for part in range(4)}
    at = sorted(thirds | set(range(prompt, length + 1)))
    return [(a, b, 1 if a else b) for a, b in pairwise(at)]


def _whole_prompt(length: int) -> list[tuple[int, int, int]]:
    """Return the same with the prompt in one piece, and one row: encoders have no logits."""
    prompt = max(1, length - _DECODED)
    return [(0, prompt, 1), *((at, at + 1, 1) for at in range(prompt, length))]


def _relative_error(one: Tensor, other: Tensor) -> float:
    """Return the largest difference relative to the largest value; infinity for NaN."""
    largest = other.float().abs().max().clamp_min(1e-9)
    error = float((one.float() - other.float()).abs().max() / largest)
    return error if error == error else float("inf")
