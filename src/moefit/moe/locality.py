"""How local routing is in time: a loss that makes it more so, and statistics for the log.

A server that holds few experts reads less if consecutive tokens use the same experts.

Shapes: B sequences, T tokens of a sequence, E experts, K chosen per token, W tokens of a window,
N windows.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moefit.moe.residents import slot_hits

WINDOW = 32
HITS_SEQUENCES, HITS_TOKENS = 2, 512
"""Most that `slot_hits` looks at: its simulation goes token by token in Python."""


def routing_locality_loss(logits_BTE: Tensor) -> Tensor:
    """Return the mean over tokens of |g_t - g_(t-1)|^2, where g is the softmax of the logits.

    Args:
        logits_BTE: Router logits of one layer.

    Returns:
        A scalar between 0 and 2; 0 for sequences of one token.
    """
    scores_BTE = logits_BTE.float().softmax(-1)
    change_BT = scores_BTE.diff(dim=1).square().sum(-1)
    return change_BT.sum() / max(1, change_BT.numel())


def locality_statistics(logits: Sequence[Tensor], sequences: int, k: int) -> dict[str, float]:
    """Return means over layers of what decides how often an expert must be fetched.

    - `window_entropy`: entropy of the mean routing in a window of 32 tokens, divided by ln E.
    - `window_coverage`: share of a window's router weight on its E / 3 heaviest experts.
    - `reuse_distance`: tokens since an expert was last among the K best of its sequence; first
      uses are left out, and so is the statistic if no expert is used twice.
    - `slot_hits`: share of the K best experts that a server with E / 3 slots holds (at least K;
      the same eviction as the server's), from the second token of a sequence on; in the first
      512 tokens of the first two sequences.

    Args:
        logits: Per layer [B * T, E].
        sequences: B.
        k: K.
    """
    if not logits:
        return {}
    rows = [_one(layer.detach().float().unflatten(0, (sequences, -1)), k) for layer in logits]
    names = ("window_entropy", "window_coverage", "reuse_distance", "slot_hits")
    means = dict(zip(names, torch.stack(rows).nanmean(0).tolist(), strict=True))
    return {name: mean for name, mean in means.items() if math.isfinite(mean)}


def _one(logits_BTE: Tensor, k: int) -> Tensor:
    scores_BTE = logits_BTE.softmax(-1)
    tokens, num_experts = scores_BTE.shape[1:]
    width = min(WINDOW, tokens)
    whole_BTE = scores_BTE[:, : tokens // width * width]
    mean_NE = whole_BTE.unflatten(1, (-1, width)).mean(2).flatten(0, 1)
    entropy_N = -(mean_NE * mean_NE.clamp_min(1e-30).log()).sum(-1)
    scale = torch.tensor(float(max(2, num_experts))).log()
    covered_N = mean_NE.topk(max(1, round(num_experts / 3)), dim=-1).values.sum(-1)
    distance = _reuse_distance(scores_BTE.topk(min(k, num_experts), dim=-1).indices, num_experts)
    chosen = min(k, num_experts)
    few_BTE = logits_BTE[:HITS_SEQUENCES, :HITS_TOKENS]
    hits = torch.tensor(slot_hits(few_BTE, chosen, max(chosen, round(num_experts / 3))))
    return torch.stack([entropy_N.mean().cpu() / scale, covered_N.mean().cpu(), distance, hits])


def _reuse_distance(ids_BTK: Tensor, num_experts: int) -> Tensor:
    """Return the mean distance between consecutive uses; NaN if no expert is used twice."""
    used_BTE = torch.zeros(*ids_BTK.shape[:2], num_experts, dtype=torch.bool).scatter_(
        -1, ids_BTK.cpu(), True
    )
    sequence_R, expert_R, time_R = used_BTE.transpose(1, 2).nonzero(as_tuple=True)[0:3]
    same_R = (sequence_R.diff() == 0) & (expert_R.diff() == 0)
    return time_R.diff()[same_R].float().mean()
