"""The full model's output on a text, kept small, and how far another output is from it.

Owns the likeliest tokens of every position with their log-probabilities; all others count as one.
So the divergence is a lower bound of the real one, and exact where nothing is left out. It is kept
in a file, for the full model may be run at no other time than when the profile begins.

Shapes: B windows, T tokens, V vocabulary, N likeliest.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moefit.serve.guards import refuse_no_numbers
from moefit.serve.served import ServedModel

LIKELIEST = 512
_LOGITS_AT_ONCE = 64 << 20  # bytes of float32 logits that a forward pass may make


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Of each window's tokens but the last: what follows by the full model, and what did."""

    windows_BT: Tensor
    ids_BTN: Tensor
    logp_BTN: Tensor
    nll_BT: Tensor

    def distance(self, logp_TV: Tensor, window: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """KL(full || this) in nats and this one's loss, token by token from `first` on."""
        last = first + len(logp_TV)
        ids_TN = self.ids_BTN[window, first:last]
        full_TN = self.logp_BTN[window, first:last]
        other_TN = logp_TV.gather(-1, ids_TN.long())
        kl_T = (full_TN.exp() * (full_TN - other_TN)).sum(-1)
        if ids_TN.shape[-1] < logp_TV.shape[-1]:
            left_T, other_left_T = _left(full_TN), _left(other_TN)
            kl_T += left_T * (left_T.log() - other_left_T.log())
        targets_T = self.windows_BT[window, first + 1 : last + 1]
        return kl_T, -logp_TV.gather(-1, targets_T[:, None])[:, 0]

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        part = path.with_name(f".{path.name}.part")
        with part.open("wb") as file:
            np.savez(
                file,
                windows=self.windows_BT.numpy(),
                ids=self.ids_BTN.numpy(),
                logp=self.logp_BTN.numpy(),
                nll=self.nll_BT.numpy(),
            )
        part.replace(path)


def read_reference(path: Path) -> Reference | None:
    """What `save` wrote; None if it is not there or damaged, for it can be made again."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            windows, ids, logp, nll = (
                torch.from_numpy(arrays[name]) for name in ("windows", "ids", "logp", "nll")
            )
    except Exception:  # noqa: BLE001 - BadZipFile, MemoryError, ...: numpy raises what comes
        return None
    found = Reference(windows_BT=windows, ids_BTN=ids, logp_BTN=logp, nll_BT=nll)
    return found if _is_sound(found) else None


def _is_sound(reference: Reference) -> bool:
    """Whether the arrays are of one text, in the dtypes that `make_reference` gives them."""
    windows_BT, ids_BTN = reference.windows_BT, reference.ids_BTN
    dtypes = [one.dtype for one in (windows_BT, ids_BTN, reference.logp_BTN, reference.nll_BT)]
    if dtypes != [torch.int64, torch.int32, torch.float32, torch.float32] or windows_BT.dim() != 2:
        return False
    followed = (windows_BT.shape[0], windows_BT.shape[1] - 1)
    return (
        ids_BTN.dim() == 3
        and ids_BTN.shape[:2] == followed
        and reference.logp_BTN.shape == ids_BTN.shape
        and reference.nll_BT.shape == followed
    )


def make_reference(served: ServedModel, windows_BT: Tensor) -> Reference:
    """Run the windows through the model, whose mode must be exact."""
    ids, logp, nll = [], [], []
    for window, logp_TV in wide(served, windows_BT):
        best_TN = logp_TV.topk(min(LIKELIEST, logp_TV.shape[-1]), dim=-1)
        ids.append(best_TN.indices.int())
        logp.append(best_TN.values)
        targets_T = windows_BT[window, 1:]
        nll.append(-logp_TV.gather(-1, targets_T[:, None])[:, 0])
    return Reference(
        windows_BT=windows_BT,
        ids_BTN=torch.stack(ids),
        logp_BTN=torch.stack(logp),
        nll_BT=torch.stack(nll),
    )


@torch.inference_mode()
def wide(served: ServedModel, windows_BT: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each window's number and log-probabilities [T, V], several windows a forward pass."""
    vocabulary = served.model.config.get_text_config(decoder=True).vocab_size
    length = windows_BT.shape[1] - 1
    at_once = max(1, _LOGITS_AT_ONCE // (4 * vocabulary * length))
    for first in range(0, len(windows_BT), at_once):
        part_BT = windows_BT[first : first + at_once, :-1].to(served.model.device)
        logits_BTV = served.model(input_ids=part_BT, use_cache=False).logits
        refuse_no_numbers(logits_BTV)
        for number, logits_TV in enumerate(logits_BTV):
            yield first + number, logits_TV.float().log_softmax(-1).cpu()


def _left(logp_TN: Tensor) -> Tensor:
    """The probability of all that is not among the likeliest."""
    return (1 - logp_TN.exp().sum(-1)).clamp_min(1e-9)
