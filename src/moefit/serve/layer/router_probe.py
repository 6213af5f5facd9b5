"""Find each block's router and its scoring rule, once, after loading.

One forward pass over random tokens with the experts disabled shows which module outputs the logits
and which rule turns them into weights. Hooks then pass the logits of each step to the served
experts. DS-MoE models state their inference rule themselves; `use_rule` changes it.

Shapes: T tokens, E experts.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moefit.dsmoe.block import DsMoeBlock
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import CheckpointError, ConfigError, MoefitError, in_brief
from moefit.moe.routing import Routing, Rule
from moefit.moe.scoring import Groups, IdentifiedRule, KnownForms, RouterExample, identify
from moefit.serve.layer.moe_layer import VirtualExperts


def follow_rules(
    model: nn.Module, served: Mapping[str, VirtualExperts]
) -> tuple[RemovableHandle, ...]:
    """Keep `VirtualExperts.scoring` in step with the inference rule and bias of DS-MoE blocks.

    A bias may change no choice among the tokens of the probe, so it is not left to that.

    Returns:
        The hooks; none for other architectures.
    """
    return tuple(
        parent.register_forward_pre_hook(_rule_hook(experts))
        for experts in served.values()
        if isinstance(parent := model.get_submodule(experts.block.parent), DsMoeBlock)
    )


def check_rule(model: nn.Module, rule: Rule) -> DsMoeForCausalLM:
    """Return the model if `rule` can be used with it.

    Raises:
        ConfigError: The model is no DS-MoE, or its routers cannot choose by the rule.
    """
    if not isinstance(model, DsMoeForCausalLM):
        raise ConfigError(
            f"only DS-MoE models can be given an inference rule; {rule} was given for a "
            f"{type(model).__name__}: leave it out"
        )
    model.config.check_rule(rule)
    return model


def use_rule(model: nn.Module, rule: Rule) -> None:
    """Set the model's inference rule.

    Raises:
        ConfigError: See `check_rule`.
    """
    check_rule(model, rule).set_inference_rule(rule)


def _rule_hook(experts: VirtualExperts) -> Any:
    def update_scoring(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        assert isinstance(block, DsMoeBlock)
        rule: Rule = inputs[1]
        chosen = "normalised" if rule.renormalize else "kept"
        experts.bias_E = None if block.gate is None else block.gate.e_score_correction_bias
        known = experts.scoring
        biased = experts.bias_E is not None
        if known is not None and (known.chosen, known.biased) != (chosen, biased):
            experts.scoring = replace(known, chosen=chosen, biased=biased)

    return update_scoring


# Sequences and tokens. With fewer, rules that rarely differ (group scores) may agree by chance.
_PROBE_SHAPE = (4, 16)


@dataclass(frozen=True, slots=True)
class _Output:
    """A module's output with one number per token and expert.

    index: Position in the module's output tuple; None if the output is a tensor.
    """

    module: nn.Module
    index: int | None
    value: Tensor


@dataclass(slots=True)
class _Recording:
    outputs: list[_Output] = field(default_factory=list)
    routing: Routing | None = None


def attach_hooks(
    model: PreTrainedModel, served: Mapping[str, VirtualExperts]
) -> tuple[RemovableHandle, ...]:
    """Find every block's scoring rule and hook its router.

    A block whose rule is not found keeps `scoring` None and can only be served in exact mode.

    Args:
        model: The model with its dense weights loaded.
        served: The served experts by block name.

    Returns:
        The hooks, to be removed when the model is closed.

    Raises:
        CheckpointError: The forward pass fails, so the config does not fit the weights.
    """
    try:
        recordings = _record(model, served)
    except (MoefitError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # config values that no weight's shape depends on
        raise CheckpointError(
            f"{type(model).__name__} fails with the values in its config.json: {in_brief(error)}; "
            "use the config.json that belongs to the weights"
        ) from error
    known = _known_forms(model.config)
    names = {module: name for name, module in model.named_modules()}
    hooks: list[RemovableHandle] = []
    for name, experts in served.items():
        parent = model.get_submodule(experts.block.parent)
        hooks.append(parent.register_forward_pre_hook(_length_hook(experts), with_kwargs=True))
        recording = recordings[name]
        vectors = _per_expert_vectors(parent, experts.num_experts)
        experts.reachable = recording.routing is not None
        found = _identify(recording, vectors, known)
        if found is None:
            continue
        output, rule = found
        experts.scoring = rule.rule
        experts.bias_E = None if rule.bias is None else vectors[rule.bias]
        experts.router = names[output.module]
        hooks.append(output.module.register_forward_hook(_logits_hook(experts, output.index)))
    return tuple(hooks)


def _identify(
    recording: _Recording, vectors: Sequence[Tensor], known: KnownForms
) -> tuple[_Output, IdentifiedRule] | None:
    """Return the first recorded output that a known rule turns into the recorded routing."""
    if recording.routing is None:
        return None
    num_tokens = len(recording.routing.ids_TK)
    for output in recording.outputs:
        if output.value.numel() != num_tokens * output.value.shape[-1]:
            continue
        example = RouterExample(
            logits_TE=output.value.reshape(num_tokens, -1),
            routing=recording.routing,
            vectors=tuple(vectors),
        )
        if found := identify(example, known):
            return output, found
    return None


@torch.inference_mode()
def _record(model: PreTrainedModel, served: Mapping[str, VirtualExperts]) -> dict[str, _Recording]:
    """Run the model on random tokens and record every block's routing and candidate outputs."""
    recordings = {name: _Recording() for name in served}
    with _record_outputs(model, served, recordings):
        # Without the output head, whose logits would be the largest tensor of the whole load.
        inputs = _random_input(model)
        model.base_model(**inputs, use_cache=False)
        for experts in served.values():
            experts.recorder = lambda routing: None
        model(**{name: ids[:1, :1] for name, ids in inputs.items()}, use_cache=False)
    return recordings


@contextmanager
def _record_outputs(
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
                hook = _output_hook(recording, experts.num_experts)
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


def _output_hook(recording: _Recording, num_experts: int) -> Any:
    def record(module: nn.Module, _inputs: Any, output: Any) -> None:
        if recording.routing is not None:  # the experts have run, so this is not their router
            return
        values = list(enumerate(output)) if isinstance(output, tuple) else [(None, output)]
        for index, value in values:
            if (
                isinstance(value, Tensor)
                and value.shape[-1:] == (num_experts,)
                and value.is_floating_point()
            ):
                recording.outputs.append(_Output(module, index, value.detach().clone()))

    return record


def _logits_hook(experts: VirtualExperts, index: int | None) -> Any:
    def store_logits(_module: nn.Module, _inputs: Any, output: Any) -> None:
        experts.state.logits_TE = output if index is None else output[index]

    return store_logits


def _length_hook(experts: VirtualExperts) -> Any:
    """Return a hook that sets `prefilling` if there is more than one token per sequence."""

    def set_prefilling(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [v for v in (*inputs, *named.values()) if isinstance(v, Tensor)]
        hidden = next((v for v in tensors if v.is_floating_point() and v.dim() in (2, 3)), None)
        experts.state.prefilling = hidden is not None and hidden.shape[-2] > 1

    return set_prefilling


def _per_expert_vectors(parent: nn.Module, num_experts: int) -> list[Tensor]:
    """Return buffers and parameters of shape [E], biases first."""
    found = defaultdict(list)
    for name, tensor in (*parent.named_buffers(), *parent.named_parameters()):
        if tensor.numel() == num_experts and "experts." not in name:
            found["bias" in name].append(tensor.detach().flatten())
    return [*found[True], *found[False]]


def _known_forms(config: Any) -> KnownForms:
    """Return group limits and SparseMixer's tolerance from the model's config."""
    text = config.get_text_config(decoder=True)
    jitter = getattr(text, "router_jitter_noise", None)
    tolerances = (2 * float(jitter),) if isinstance(jitter, float) else ()
    number, kept = getattr(text, "n_group", None), getattr(text, "topk_group", None)
    if not number or not kept or number == 1:
        return KnownForms(tolerances=tolerances)
    both = (Groups(number=number, kept=kept, score=score) for score in ("top_2", "max"))
    return KnownForms(groups=tuple(both), tolerances=tolerances)


def _random_input(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = cast(Any, model.config.get_text_config(decoder=True)).vocab_size
    ids = torch.randint(3, max(4, vocabulary), _PROBE_SHAPE, generator=generator).to(model.device)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}
