"""What tests of serving share: a tiny model in several shards, served with few slots."""

from collections.abc import Collection
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefit.serve.loading import load
from moefit.serve.served import ServedModel
from moefit.serve.settings import LoadSettings

torch.set_num_threads(1)


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@contextmanager
def serving(folder: Path, *, slots: int = 1, **settings):
    """The model served with so many slots a block; nothing is resident yet."""
    with load(folder, LoadSettings(**settings)) as served:
        give_slots(served, slots)
        yield served
        served.check()


def give_slots(served: ServedModel, slots: int) -> None:
    counts = [min(slots, experts.num_experts) for experts in served.blocks.values()]
    served.set_memory(served.budget.with_slots(counts))
    assert [experts.residency.number for experts in served.blocks.values()] == counts


def hold(served: ServedModel, residents: Collection[int], mode: str, **policy) -> None:
    """Serve with these residents in every block, and with no others."""
    served.set_mode(mode, prefill=mode, residency="fixed", **policy)
    served.set_residents(dict.fromkeys(served.blocks, residents))


@torch.inference_mode()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@torch.inference_mode()
def greedy(model: PreTrainedModel, inputs: dict[str, Tensor], tokens: int = 8) -> Tensor:
    """The logits of every step of greedy generation [steps, B, V]."""
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
    """The largest difference, as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
