"""Look at each block's router at work, once, after loading.

Owns finding a block's router (the module below the block whose output has one number per token and
expert), its rule (`moe/identify.py`), and the hooks that hand logits to the served experts. Nothing
is looked up by family. One forward pass over a few random tokens with all experts silent.

Shapes: T tokens, E experts.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moefit.errors import CheckpointError, MoefitError, in_brief
from moefit.moe.identify import Example, Identified, Known, identify
from moefit.moe.routing import Routing
from moefit.moe.scoring import Groups
from moefit.serve.virtual_experts import VirtualExperts

_SHAPE = (4, 16)  # with fewer tokens, rules that differ rarely (group scores) agree by chance


@dataclass(frozen=True, slots=True)
class _Seen:
    """An output with one number per token and expert: of which module, where in its output."""

    module: nn.Module
    index: int | None
    value: Tensor


@dataclass(slots=True)
class _Recording:
    outputs: list[_Seen] = field(default_factory=list)
    routing: Routing | None = None


def attach(
    model: PreTrainedModel, served: Mapping[str, VirtualExperts]
) -> tuple[RemovableHandle, ...]:
    """Find every block's routing rule and hook its router; returns the hooks.

    A block whose rule is not found keeps `scoring` None: it can be served exactly.

    Raises CheckpointError if the model cannot compute as its configuration says.
    """
    try:
        recordings = _record(model, served)
    except (MoefitError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a family's code meets numbers that no shape of a weight shows
        raise CheckpointError(
            f"{type(model).__name__} cannot compute as its config.json says: {in_brief(error)}; "
            "give the config.json that belongs to the weights"
        ) from error
    known = _known_forms(model.config)
    hooks: list[RemovableHandle] = []
    for name, experts in served.items():
        parent = model.get_submodule(experts.block.parent)
        hooks.append(parent.register_forward_pre_hook(_length_hook(experts), with_kwargs=True))
        recording = recordings[name]
        vectors = _per_expert_vectors(parent, experts.num_experts)
        experts.used = recording.routing is not None
        found = _identify(recording, vectors, known)
        if found is None:
            continue
        seen, rule = found
        experts.scoring = rule.rule
        experts.bias_E = None if rule.bias is None else vectors[rule.bias]
        hooks.append(seen.module.register_forward_hook(_logits_hook(experts, seen.index)))
    return tuple(hooks)


def _identify(
    recording: _Recording, vectors: Sequence[Tensor], known: Known
) -> tuple[_Seen, Identified] | None:
    if recording.routing is None:
        return None
    num_tokens = len(recording.routing.ids_TK)
    for seen in recording.outputs:
        if seen.value.numel() != num_tokens * seen.value.shape[-1]:
            continue
        example = Example(
            logits_TE=seen.value.reshape(num_tokens, -1),
            routing=recording.routing,
            vectors=tuple(vectors),
        )
        if found := identify(example, known):
            return seen, found
    return None


@torch.inference_mode()
def _record(model: PreTrainedModel, served: Mapping[str, VirtualExperts]) -> dict[str, _Recording]:
    recordings = {name: _Recording() for name in served}
    with _listening(model, served, recordings):
        # Without the head: logits of all tokens would be the largest tensor of the whole load.
        inputs = _random_input(model)
        model.base_model(**inputs, use_cache=False)
        for experts in served.values():
            experts.recorder = lambda routing: None
        model(**{name: ids[:1, :1] for name, ids in inputs.items()}, use_cache=False)
    return recordings


@contextmanager
def _listening(
    model: PreTrainedModel,
    served: Mapping[str, VirtualExperts],
    recordings: Mapping[str, _Recording],
) -> Iterator[None]:
    hooks: list[RemovableHandle] = []
    for name, experts in served.items():
        recording = recordings[name]
        parent = model.get_submodule(experts.block.parent)
        for module in parent.modules():
            if module is not experts and module is not parent:
                hook = _listener(recording, experts.num_experts)
                hooks.append(module.register_forward_hook(hook))
        experts.recorder = lambda routing, recording=recording: setattr(
            recording, "routing", routing
        )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for experts in served.values():
            experts.recorder = None


def _listener(recording: _Recording, num_experts: int) -> Any:
    def hear(module: nn.Module, _inputs: Any, output: Any) -> None:
        values = list(enumerate(output)) if isinstance(output, tuple) else [(None, output)]
        for index, value in values:
            if (
                isinstance(value, Tensor)
                and value.shape[-1:] == (num_experts,)
                and value.is_floating_point()
                and recording.routing is None  # what comes behind the experts is no router
            ):
                recording.outputs.append(_Seen(module, index, value.detach().clone()))

    return hear


def _logits_hook(experts: VirtualExperts, index: int | None) -> Any:
    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        experts.logits_TE = output if index is None else output[index]

    return keep


def _length_hook(experts: VirtualExperts) -> Any:
    """A block that is given more than one token of a sequence is prefilling."""

    def look(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [v for v in (*inputs, *named.values()) if isinstance(v, Tensor)]
        hidden = next((v for v in tensors if v.is_floating_point() and v.dim() in (2, 3)), None)
        experts.prefilling = hidden is not None and hidden.shape[-2] > 1

    return look


def _per_expert_vectors(parent: nn.Module, num_experts: int) -> list[Tensor]:
    """Buffers and parameters [E] of the block: a bias or a factor may be among them."""
    found = defaultdict(list)
    for name, tensor in (*parent.named_buffers(), *parent.named_parameters()):
        if tensor.numel() == num_experts and "experts." not in name:
            found["bias" in name].append(tensor.detach().flatten())
    return [*found[True], *found[False]]


def _known_forms(config: Any) -> Known:
    """What the configuration says of groups and of SparseMixer's noise."""
    text = config.get_text_config(decoder=True)
    jitter = getattr(text, "router_jitter_noise", None)
    tolerances = (2 * float(jitter),) if isinstance(jitter, float) else ()
    number, kept = getattr(text, "n_group", None), getattr(text, "topk_group", None)
    if not number or not kept or number == 1:
        return Known(tolerances=tolerances)
    both = (Groups(number=number, kept=kept, score=score) for score in ("top_2", "max"))
    return Known(groups=tuple(both), tolerances=tolerances)


def _random_input(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = cast(Any, model.config.get_text_config(decoder=True)).vocab_size
    ids = torch.randint(3, max(4, vocabulary), _SHAPE, generator=generator).to(model.device)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}
