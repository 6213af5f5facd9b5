"""Weights to begin with, in place of random ones: a second stage of training.

Owns reading them from another run's last checkpoint, or from a model folder, and the check that
they are this model's. Optimizer, schedule and data begin anew; `state.py` is for going on.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from moefit.checkpoint import Checkpoint
from moefit.errors import ConfigError
from moefit.quantisation import refuse_declared, refuse_integers
from moefit.train.checkpoint import MANIFEST, checkpoints, verify


def start_from(model: PreTrainedModel, source: str) -> None:
    """Copy weights into a freshly built model, by name.

    Raises ConfigError if there is nothing at `source`, or its weights are of another model;
    CheckpointError if they can't be read; UnsupportedModelError if they are quantised.
    """
    folder = Path(source).expanduser()
    if not (folder / "config.json").is_file():
        found = checkpoints(folder)
        if not found:
            raise ConfigError(
                f"start_from={source!r} is neither a model folder (config.json) nor a run with a "
                "finished checkpoint; leave it out to begin with random weights"
            )
        folder = found[-1]
    if (folder / MANIFEST).is_file():
        verify(folder)
    refuse_declared(folder)
    with Checkpoint(folder) as stored:
        _copy(model, stored, source)


@torch.no_grad()
def _copy(model: PreTrainedModel, stored: Checkpoint, source: str) -> None:
    ours = model.state_dict()
    tied = set(model.all_tied_weights_keys)
    wrong = [f"lacks {name}" for name in sorted(ours.keys() - stored.spans.keys() - tied)]
    wrong += [f"has {name}" for name in sorted(stored.spans.keys() - ours.keys())]
    wrong += [
        f"has {name} {list(span.shape)}, not {list(ours[name].shape)}"
        for name, span in sorted(stored.spans.items())
        if name in ours and span.shape != tuple(ours[name].shape)
    ]
    if wrong:
        raise ConfigError(
            f"start_from={source!r} is of another model than this configuration describes: it "
            f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}; give the model settings "
            "and the tokenizer that it was made with"
        )
    for name, span in stored.spans.items():
        if ours[name].is_floating_point():
            refuse_integers(span, name)
        ours[name].copy_(stored.tensor(span))
