"""Fit probes: read a text with the model, and learn which experts later routers choose.

`recording.py` runs the text through the model. Then, block by block, linear maps to the logits of
the next blocks are fitted from the later routers' own weights by AdamW: KL to the router's
probabilities, or, for scores per expert, cross-entropy with each. A probe is kept if it finds more
of the chosen experts than the later router does, on the last eighth of the text, which it is not
fitted on.

Shapes: T tokens, D model width, E experts, N experts of all blocks that one block predicts.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moefit.errors import MoefitError, UnsupportedModelError
from moefit.folders import exclusive_folder
from moefit.serve.hf.skeleton import Skeleton
from moefit.serve.packed.calibrate import CalibrationText
from moefit.serve.prediction.next_router import LinearMap, unpredictable
from moefit.serve.prediction.pregated import is_pregated
from moefit.serve.prediction.probes import (
    DEPTHS,
    Place,
    ProbeLocation,
    ProbeMetadata,
    place_name,
)
from moefit.serve.prediction.recording import Progress, RecordedRouter, Recording, record

_RECORDING = ".probes"  # folder within that of the probes, while they are fitted
_EPOCHS, _BATCH, _RATE, _DECAY = 20, 512, 3e-3, 0.01
_SMALL_SCALE = 1e-3  # relative to the mean scale of inputs: smaller ones are not enlarged
_CHUNK = 1024  # tokens


@dataclass(slots=True, kw_only=True)
class ProbeResult:
    """What `fit_probes` did.

    Attributes:
        path: The file.
        metadata: What it holds.
        skipped: Whether it existed already, fitted on this text.
        nbytes: Its size.
        seconds: Duration.
    """

    path: Path
    metadata: ProbeMetadata
    skipped: bool = False
    nbytes: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return JSON-serialisable values."""
        recalls = {
            str(ahead): dict(zip(("probes", "next_router"), means, strict=True))
            for ahead in range(1, DEPTHS + 1)
            if any(means := self.metadata.mean_recalls(ahead))
        }
        return {
            "path": str(self.path),
            "probes": len(self.metadata.recalls),
            "text": self.metadata.text,
            "tokens": self.metadata.tokens,
            "recall": recalls,
            "skipped": self.skipped,
            "bytes": self.nbytes,
            "seconds": self.seconds,
        }


def fit_probes(
    skeleton: Skeleton,
    text: CalibrationText,
    *,
    force: bool = False,
    reading: Progress = lambda done, total: None,
    fitting: Progress = lambda done, total: None,
) -> ProbeResult:
    """Fit probes of a model on a text, and write them beside its packed store.

    Args:
        skeleton: The model.
        text: The text, and the memory budget for reading it.
        force: Fit again what was fitted on this text already.
        reading: Called with the windows of the text that are read, and all of them.
        fitting: Called with the blocks that are fitted, and all of them.

    Raises:
        UnsupportedModelError: Experts of the model are not predicted; the message says why.
        ConfigError: Another process is packing this model.
        CheckpointError: There is too little space, or the file cannot be written.
        MoefitError: The model cannot be loaded; see `load_model`.
    """
    refuse_unpredictable(skeleton)
    began, location = perf_counter(), ProbeLocation(skeleton)
    busy = f"another process is packing this model into {location.folder}; wait for it to end"
    with exclusive_folder(location.folder, busy=busy):
        if not force and (before := _fitted_before(location, text)) is not None:
            return before
        folder = location.folder / _RECORDING
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        try:
            recorded = record(skeleton, text, folder, reading)
            fitted = max(map(recorded.fitted, range(len(skeleton.blocks))))
            if not fitted:
                family = type(skeleton.model).__name__
                raise UnsupportedModelError(
                    f"no probes are fitted: the routers of {family} were not recognised; leave "
                    "--probes out"
                )
            maps, recalls = _fit_all(recorded, skeleton.dtype, fitting)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        metadata = location.metadata(
            text=text.text, digest=text.digest, tokens=fitted, recalls=recalls
        )
        nbytes = location.write(metadata, maps)
    took = perf_counter() - began
    return ProbeResult(path=location.path, metadata=metadata, nbytes=nbytes, seconds=took)


def refuse_unpredictable(skeleton: Skeleton) -> None:
    """Raise UnsupportedModelError if no probes can be fitted to a model."""
    reason = unpredictable(skeleton.model, len(skeleton.blocks))
    if is_pregated(skeleton.model):
        reason = "the model is pre-gated, and its routers know the next layer's experts"
    if reason:
        raise UnsupportedModelError(f"no probes are fitted: {reason}; leave --probes out")


def _fitted_before(location: ProbeLocation, text: CalibrationText) -> ProbeResult | None:
    """Return the probes that were fitted on this text already, if the file is sound."""
    try:
        file = location.open()
        if file is None or file.metadata.digest != text.digest:
            return None
        file.read(DEPTHS, torch.device("cpu"))
    except MoefitError:  # damaged, or of another checkpoint: replaced
        return None
    size = file.path.stat().st_size
    return ProbeResult(path=file.path, metadata=file.metadata, skipped=True, nbytes=size)


@dataclass(slots=True)
class _Target:
    """A later block that one block's inputs are to predict.

    Attributes:
        place: Of the probe.
        router: The later block's.
        logits_TE: Its logits.
        chosen_TE: Its choice.
        start: Its router as a map of the inputs, if it is one.
    """

    place: Place
    router: RecordedRouter
    logits_TE: Tensor
    chosen_TE: Tensor
    start: LinearMap | None = field(repr=False)


def _fit_all(
    recorded: Recording, dtype: torch.dtype, progress: Progress
) -> tuple[dict[Place, LinearMap], dict[str, tuple[float, float | None]]]:
    """Return the probes that are better than the next router, and the recall of both."""
    maps: dict[Place, LinearMap] = {}
    recalls: dict[str, tuple[float, float | None]] = {}
    blocks = len(recorded.tokens)
    progress(0, blocks)
    for block in range(blocks):
        if targets := _targets(recorded, block):
            x_TD, first = recorded.inputs(block), recorded.fitted(block)
            for target, probe in zip(targets, _fitted(x_TD[:first], targets), strict=True):
                probe = LinearMap(probe.weight_ED.to(dtype), _cast(probe.bias_E, dtype))
                found, router = _measured(x_TD[first:], target, probe, first)
                if found is not None and (router is None or found > router):
                    maps[target.place] = probe
                    recalls[place_name(*target.place)] = found, router
        progress(block + 1, blocks)
    return maps, recalls


def _cast(bias_E: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert bias_E is not None
    return bias_E.to(dtype)


def _targets(recorded: Recording, block: int) -> list[_Target]:
    starts = recorded.starts(block)
    targets: list[_Target] = []
    for ahead in recorded.ahead(block):
        name = place_name(block, ahead)
        weight_ED = starts.get(f"{name}.weight")
        targets.append(
            _Target(
                (block, ahead),
                recorded.routers[block + ahead],
                recorded.logits(block + ahead),
                recorded.choice(block + ahead),
                None if weight_ED is None else LinearMap(weight_ED, starts.get(f"{name}.bias")),
            )
        )
    return targets


def _fitted(x_TD: Tensor, targets: Sequence[_Target]) -> list[LinearMap]:
    """Return a map for each target, fitted on these tokens; all with one product per step."""
    tokens, scale_D = len(x_TD), _scale(x_TD)
    sizes = [one.router.num_experts for one in targets]
    begun = [_begin(one, x_TD.shape[1]) for one in targets]
    weight_ND = (torch.cat([one[0] for one in begun]) * scale_D).requires_grad_()
    bias_N = torch.cat([one[1] for one in begun]).requires_grad_()
    optimizer = torch.optim.AdamW([weight_ND, bias_N], lr=_RATE, weight_decay=_DECAY)
    steps = max(1, _EPOCHS * tokens // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        at = torch.randint(tokens, (_BATCH,), generator=generator)
        made_TN = F.linear(x_TD[at].float() / scale_D, weight_ND, bias_N)
        losses = [
            target.router.loss(made_TE, target.logits_TE[at])
            for target, made_TE in zip(targets, made_TN.split(sizes, 1), strict=True)
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
    weights = (weight_ND.detach() / scale_D).split(sizes)
    biases = bias_N.detach().split(sizes)
    return [LinearMap(w.contiguous(), b.contiguous()) for w, b in zip(weights, biases, strict=True)]


def _begin(target: _Target, width: int) -> tuple[Tensor, Tensor]:
    """Return the weights and biases to begin with."""
    experts = target.router.num_experts
    if target.start is None:
        return torch.zeros(experts, width), torch.zeros(experts)
    bias_E = target.start.bias_E
    return target.start.weight_ED, torch.zeros(experts) if bias_E is None else bias_E


def _scale(x_TD: Tensor) -> Tensor:
    """Return the standard deviation of inputs per element, in parts that take little memory."""
    total_D = square_D = torch.zeros(x_TD.shape[1])
    for part_TD in x_TD.split(_CHUNK):
        part_TD = part_TD.float()
        total_D, square_D = total_D + part_TD.sum(0), square_D + part_TD.square().sum(0)
    mean_D = total_D / len(x_TD)
    scale_D = (square_D / len(x_TD) - mean_D.square()).clamp_min(0).sqrt()
    return scale_D.clamp_min(_SMALL_SCALE * float(scale_D.mean())).clamp_min(1e-12)


def _measured(
    x_TD: Tensor, target: _Target, probe: LinearMap, first: int
) -> tuple[float | None, float | None]:
    """Return the recall of a probe and of the router itself on the tokens from `first` on."""
    assert probe.bias_E is not None
    if not bool(probe.weight_ED.isfinite().all() & probe.bias_E.isfinite().all()):
        return None, None  # beyond the largest number of 16 bits
    chosen_TE = target.chosen_TE[first:]
    recalls: list[float | None] = []
    for one in (probe, target.start):
        if one is None:
            recalls.append(None)
            continue
        parts = [one(part_TD.to(one.weight_ED.dtype)) for part_TD in x_TD.split(_CHUNK)]
        recalls.append(target.router.recall(torch.cat(parts), chosen_TE))
    return recalls[0], recalls[1]
