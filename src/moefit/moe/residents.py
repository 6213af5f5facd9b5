"""Which experts a server with few slots would hold at each token, and a loss on what it would read.

Exact mode fetches each expert that a token chooses and that no slot holds. The slot table of the
server is simulated along each sequence with the server's default eviction: the expert that is used
least often, with a decay. `eviction_loss` then moves the choice towards what the slots hold.

Shapes: B sequences, T tokens of a sequence, E experts, N = B sequences of any layers.
"""

import numpy as np
import torch
from torch import Tensor

from moefit.graphs import outside_of_graphs
from moefit.moe.routing import Rule, active_experts

HALF_LIFE = 24.0  # tokens; of the eviction policy `lfu`
TEMPERATURE = 1.0  # of the soft choice, in units of logits


@outside_of_graphs
@torch.no_grad()
def simulated_residents(
    chosen_BTE: Tensor, slots: int, *, half_life: float = HALF_LIFE
) -> tuple[Tensor, Tensor]:
    """Return which experts the slots hold before each token of a sequence.

    Slots are empty before the first token. If a token chooses more experts than there are slots,
    those that were used most often remain.

    Args:
        chosen_BTE: True for the experts that a token uses.
        slots: Experts of a layer that fit in memory.
        half_life: Tokens after which a use counts half.

    Returns:
        resident_BTE, and full_BT, whether all slots are in use.
    """
    chosen = chosen_BTE.cpu().numpy().astype(bool)
    sequences, tokens, _ = chosen.shape
    before = np.zeros_like(chosen)
    resident = np.zeros_like(chosen[:, 0])
    counts = np.zeros(resident.shape)
    rows = np.arange(sequences)[:, None]
    for token in range(tokens):
        before[:, token] = resident
        needed = chosen[:, token]
        counts = counts * 0.5 ** (1 / half_life) + needed
        # Needed experts stay, then the most used ones; of equal ones the lowest is evicted first.
        rank = np.where(resident | needed, counts + needed * (2 * tokens), -1.0)
        kept = np.argsort(rank, axis=1, kind="stable")[:, -slots:]
        held = resident | needed
        resident = np.zeros_like(held)
        resident[rows, kept] = held[rows, kept]
    resident_BTE = torch.from_numpy(before).to(chosen_BTE.device)
    return resident_BTE, resident_BTE.sum(-1) >= slots


def choice_margins(logits_TE: Tensor, rule: Rule) -> Tensor:
    """Return by how much each logit is above (or below) what the rule needs to choose the expert.

    Args:
        logits_TE: Router logits [.., E].
        rule: `top_k`, with the middle between the k-th and the next logit as the border, or
            `threshold`, with the logarithm of the score.
    """
    if rule.k is None:
        assert rule.kind == "threshold" and rule.epsilon is not None
        border = torch.tensor(rule.epsilon / logits_TE.shape[-1]).log()
        return logits_TE.log_softmax(-1) - border.to(logits_TE.device)
    best_TK = logits_TE.detach().topk(rule.k + 1, dim=-1).values
    # Logits of -inf exclude experts: a border of -inf would give those a margin of NaN.
    least = torch.finfo(best_TK.dtype).min / 4
    return logits_TE - best_TK[..., -2:].clamp_min(least).mean(-1, keepdim=True)


def eviction_loss(logits_BTE: Tensor, rule: Rule, slots: int) -> Tensor:
    """Return a soft count of the choices that would evict another expert, per choice.

    An expert counts as chosen to the degree sigmoid(margin); absent experts are to be chosen less,
    residents more. Tokens for which a slot is empty do not count.

    Args:
        logits_BTE: Router logits of one layer.
        rule: How experts are chosen: `top_k` or `threshold`.
        slots: Experts of a layer that fit in memory.

    Returns:
        A scalar, about the share of choices that are not resident.
    """
    logits_BTE = logits_BTE.float()
    margin_BTE = choice_margins(logits_BTE, rule)
    chosen_BTE = chosen_experts(logits_BTE, rule)
    resident_BTE, full_BT = simulated_residents(chosen_BTE, slots)
    soft_BTE = (margin_BTE / TEMPERATURE).sigmoid()
    # The border is constant, so both directions have a gradient; each counts half.
    wrong_BT = torch.where(resident_BTE, 1 - soft_BTE, soft_BTE).sum(-1)
    least_BT = (resident_BTE.sum(-1) - chosen_BTE.sum(-1)).clamp_min(0)
    count = (chosen_BTE.sum(-1) * full_BT).sum().clamp_min(1)
    return ((wrong_BT - least_BT) * full_BT).sum() / (2 * count)


def chosen_experts(logits_BTE: Tensor, rule: Rule) -> Tensor:
    """Return chosen_BTE, True for the experts that the rule chooses."""
    scores_NE = logits_BTE.detach().softmax(-1).flatten(0, -2)
    return active_experts(scores_NE, rule).view(logits_BTE.shape)


def slot_hits(logits_BTE: Tensor, k: int, slots: int) -> float:
    """Return the share of the k best experts that slots hold, from the second token on.

    Args:
        logits_BTE: Router logits of one layer.
        k: Experts per token.
        slots: Experts of a layer that fit in memory, at least k.

    Returns:
        0 to 1; NaN for sequences of one token.
    """
    chosen_BTE = chosen_experts(logits_BTE, Rule(kind="top_k", k=k))
    resident_BTE, _ = simulated_residents(chosen_BTE, slots)
    return float((resident_BTE & chosen_BTE)[:, 1:].sum(-1).float().mean()) / k
