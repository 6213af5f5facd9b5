"""Which runner a model can have, found by trying.

Owns the comparison: two texts together, in parts and then token by token, against the model's own
pass over each of them. Experts are silent meanwhile, so nothing is read, moved or counted; they
take tokens one by one and don't know of packing. What so short a text can't show is asked of the
configuration: positions that mean something else in a longer text, rules that look at the batch.

Shapes: T tokens, V vocabulary.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefit.dsmoe.config import DsMoeConfig
from moefit.engine.runners import Runner, RunnerInput, SeparateRunner, VarlenRunner
from moefit.engine.varlen import register_varlen_attention
from moefit.moe.routing import Rule
from moefit.serve.model import ServedModel

_LOG = logging.getLogger(__name__)
_LENGTHS, _DECODED = (13, 9), 3
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def choose_runner(served: ServedModel, places: int) -> Runner:
    """The packed runner if it gives the model's own logits, else the separate one."""
    model = served.model
    texts = _texts(model, places)
    with torch.inference_mode(), _without_experts(served):
        if (reason := _unpackable(model.config)) is None:
            register_varlen_attention()
            runner = VarlenRunner(model, places)
            reason = _difference(runner, texts)
            if reason is None:
                runner.settle()
                reason = _difference(runner, texts)
            if reason is None:
                return runner
        _LOG.info("%s: requests are computed one by one: %s", type(model).__name__, reason)
        whole = bool(model.config.is_encoder_decoder) or _looks_at_the_batch(model.config)
        if not whole:
            whole = _difference(SeparateRunner(model, whole_prompts=False), texts) is not None
        return SeparateRunner(model, whole_prompts=whole)


def _texts(model: PreTrainedModel, places: int) -> list[list[int]]:
    vocabulary: int = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    scale = min(1.0, places / (sum(_LENGTHS) + 2 * _DECODED))
    lengths = [max(1, int((length + _DECODED) * scale)) for length in _LENGTHS]
    low = min(3, vocabulary - 1)  # the first few are often padding and the like
    return [torch.randint(low, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def _unpackable(config: Any) -> str | None:
    """Why a model can't be packed, as far as its configuration tells."""
    if config.is_encoder_decoder:
        return "it has an encoder"
    if _looks_at_the_batch(config):
        return "its rule counts experts over all tokens of a step"
    rope = _rope_types(config.get_text_config(decoder=True).to_dict().get("rope_parameters"))
    if changing := rope & {"dynamic", "longrope"}:
        return f"its positions ({', '.join(changing)}) depend on the longest text of a step"
    return None


def _looks_at_the_batch(config: Any) -> bool:
    rule = config.inference_rule if isinstance(config, DsMoeConfig) else "dense"
    return Rule.parse(rule).kind == "threshold_top_k"


def _rope_types(parameters: Any) -> set[str]:
    """Of all layers, which may each have their own."""
    if not isinstance(parameters, dict):
        return set()
    found = {str(parameters["rope_type"])} if "rope_type" in parameters else set[str]()
    return found.union(*(_rope_types(one) for one in parameters.values()))


@contextmanager
def _without_experts(served: ServedModel) -> Iterator[None]:
    """Let all experts give zeros, and see nothing."""
    for experts in served.blocks.values():
        experts.recorder = lambda _routing: None
    try:
        yield
    finally:
        for experts in served.blocks.values():
            experts.recorder = None


def _difference(runner: Runner, texts: Sequence[Sequence[int]]) -> str | None:
    """Why a runner's logits are not the model's own; None if they are, up to rounding."""
    device = runner.model.device
    try:
        made = _in_parts(runner, texts)
    except Exception as error:  # noqa: BLE001 - whatever a family's code says to it
        return f"{type(error).__name__}: {error}"
    for text, phases in zip(texts, made, strict=True):
        own_TV = runner.model(input_ids=torch.tensor([text], device=device)).logits[0]
        for end, rows in phases:
            far = _distance(rows, own_TV[end - len(rows) : end])
            if far > _TOLERANCE.get(rows.dtype, 1e-3):
                return f"logits of token {end} differ by {far:.1e} of the largest"
    return None


def _in_parts(runner: Runner, texts: Sequence[Sequence[int]]) -> list[list[tuple[int, Tensor]]]:
    """Each text's logits, behind how many tokens: of its prompt, read in parts beside the others',
    and of tokens decoded. The second text begins a step later, so that one decodes while another
    reads.
    """
    plans = [[(0, 0, 0)] * number + _cuts(len(text)) for number, text in enumerate(texts)]
    made: list[list[tuple[int, Tensor]]] = [[] for _ in texts]
    for number, text in enumerate(texts):
        runner.open(str(number), len(text))
    try:
        for step in range(max(map(len, plans))):
            parts = [(n, plan[step]) for n, plan in enumerate(plans) if step < len(plan)]
            works = [
                (
                    n,
                    RunnerInput(
                        request=str(n), tokens=texts[n][begin:end], past=begin, wants=wants
                    ),
                )
                for n, (begin, end, wants) in parts
                if end
            ]
            logits_NV = runner.step([work for _, work in works])
            rows = logits_NV.split([work.wants for _, work in works])
            for (number, work), logits in zip(works, rows, strict=True):
                made[number].append((work.past + len(work.tokens), logits.clone()))
    finally:
        for number in range(len(texts)):
            runner.close(str(number))
    return made


def _cuts(length: int) -> list[tuple[int, int, int]]:
    """A prompt in three parts, then one token at a time: from, to, of how many logits."""
    prompt = max(1, length - _DECODED)
    thirds = {prompt * part // 3 for part in range(4)}
    at = sorted(thirds | set(range(prompt, length + 1)))
    return [(a, b, 1 if a else b) for a, b in pairwise(at)]


def _distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value; infinite if not a number."""
    largest = other.float().abs().max().clamp_min(1e-9)
    far = float((one.float() - other.float()).abs().max() / largest)
    return far if far == far else float("inf")
