"""Helpers for tests of serving: a tiny model in several shards, served with few slots."""

from collections.abc import Collection
from contextlib import contextmanager
from pathlib import Path

import torch
from tiny_models import tokens
from torch import Tensor
from transformers import PreTrainedModel

from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel

torch.set_num_threads(1)
# Of the largest output of a block in bfloat16. Products, hidden units and their weighted sum are
# each rounded by half a step of 2^-8, and in another order of summing some are rounded otherwise.
BFLOAT16 = 2.0**-4


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@contextmanager
def serving(folder: Path, *, slots: int = 1, **settings):
    """Serve the model with `slots` per block and no resident experts."""
    with load_model(folder, LoadSettings(**settings)) as served:
        give_slots(served, slots)
        yield served
        served.check()


def give_slots(served: ServedModel, slots: int) -> None:
    counts = [min(slots, experts.num_experts) for experts in served.blocks.values()]
    served.set_memory(served.budget.total_for_slots(counts))
    assert [experts.slot_table.num_slots for experts in served.blocks.values()] == counts


def hold(served: ServedModel, residents: Collection[int], mode: str, **policy) -> None:
    """Use exactly these resident experts in every block."""
    served.set_mode(mode, prefill=mode, residency="fixed", **policy)
    served.set_residents(dict.fromkeys(served.blocks, residents))


@torch.inference_mode()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@torch.inference_mode()
def greedy(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int = 8) -> Tensor:
    """Return the logits of every step of greedy generation [steps, B, V]."""
    made = model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(made.logits)


def differs_by(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference divided by the largest value."""
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


@torch.inference_mode()
def assert_same_but_for_rounding(
    served: ServedModel, model: PreTrainedModel, inputs: dict[str, Tensor], share: float = BFLOAT16
) -> None:
    """Check that each block equals the model's for the same inputs, up to rounding.

    Holds in 16 bits on every processor. Logits may differ more, because different rounding of one
    sum may change the choice of an expert in a later block.
    """
    for name, parameter in served.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    calls = calls_of(model, served, inputs)
    assert {name for name, *_ in calls} == {n for n, one in served.blocks.items() if one.reachable}
    for name, given, named, theirs in calls:
        ours = served.model.get_submodule(name)(*given, **named)
        ours, theirs = (one if isinstance(one, Tensor) else one[0] for one in (ours, theirs))
        assert ours.dtype == theirs.dtype and differs_by(ours, theirs) <= share, name


def calls_of(model: PreTrainedModel, served: ServedModel, inputs: dict[str, Tensor]) -> list:
    """Record name, arguments, keyword arguments and output of the model's own blocks."""
    calls, hooks = [], []
    for name in served.blocks:
        hooks.append(
            model.get_submodule(name).register_forward_hook(
                lambda _, given, named, made, name=name: calls.append((name, given, named, made)),
                with_kwargs=True,
            )
        )
    logits(model, inputs)
    for hook in hooks:
        hook.remove()
    return calls


def check_served(folder: Path, model: PreTrainedModel, rule: str, slots: int, experts: int) -> None:
    """Compare a model that routes early, served with few slots, with the model itself."""
    inputs = {"input_ids": tokens(1, 11)}
    with load_model(folder, LoadSettings()) as served:
        give_slots(served, slots)
        served.model.set_inference_rule(rule)
        assert differs_by(logits(served.model, inputs), logits(model, inputs)) < 1e-5
        assert differs_by(greedy(served.model, inputs), greedy(model, inputs)) < 1e-5
        served.check()
        if rule.startswith("top_k") and 1 < slots < experts:
            assert served.report()["prefetches"] > 0
        assert served.prefetching.prefetcher.failure == ""
