"""What a checkpoint records of training with expert dropout, under `expert_dropout` in config.json.

Training writes the record and serving reads it: which experts to hold first, and what the model
lost on held-out text with fewer experts. Does not depend on the model family or on torch.

Shapes: L MoE layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from moefit.errors import CheckpointError

KEY = "expert_dropout"
CARD = "README.md"
Order = Literal["random", "nested", "mixed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDropoutRecord:
    """How a model was trained with experts absent.

    Attributes:
        order: How the experts of a sequence were chosen: `random`, `nested` (the first ones of the
            resident order), or `mixed`, half of the sequences each.
        share: Share of the sequences that had experts absent.
        least: Fewest experts per layer that a sequence had.
        begin: Share of the training steps before the first such sequence.
        resident_order: Per MoE layer, all experts in the order in which they should be held in
            memory; empty if the order is `random`.
        held_out_loss: Loss on held-out text in nats per token, by the number of experts per layer.
    """

    order: Order
    share: float
    least: int
    begin: float
    resident_order: tuple[tuple[int, ...], ...] = ()
    held_out_loss: Mapping[int, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the value of `expert_dropout` in config.json."""
        losses = None if self.held_out_loss is None else dict(self.held_out_loss)
        return {
            "order": self.order,
            "share": self.share,
            "least": self.least,
            "begin": self.begin,
            "resident_order": [list(one) for one in self.resident_order],
            "held_out_loss": losses and {str(count): loss for count, loss in losses.items()},
        }

    def costs(self) -> dict[int, float]:
        """Return the relative increase of perplexity by the number of experts per layer.

        >>> record = ExpertDropoutRecord(order="random", share=0.5, least=1, begin=0.0,
        ...     held_out_loss={4: 2.0, 2: 2.0})
        >>> record.costs()
        {4: 0.0, 2: 0.0}
        """
        losses = self.held_out_loss or {}
        if not losses:
            return {}
        full = losses[max(losses)]
        # A damaged file may hold any number; math.exp raises above 709.
        return {count: math.expm1(min(loss - full, 700.0)) for count, loss in losses.items()}

    def model_card(self) -> str:
        """Return the text of a README.md: how the model was trained, and what each budget costs."""
        how = f"in {self.share:.0%} of the sequences, from {self.begin:.0%} of the training on"
        text = (
            f"# Model card\n\nTrained with expert dropout ({self.order}): {how}, only some of the "
            f"experts of each layer could be used, {self.least} or more. The model therefore loses "
            "little when a server holds only some of its experts: `moefit serve MODEL --memory "
            "BUDGET --mode virtual`.\n"
        )
        costs = self.costs()
        if not costs:
            return text
        rows = [
            f"| {count} of {max(costs)} | {cost:+.1%} |"
            for count, cost in sorted(costs.items(), reverse=True)
        ]
        head = "| experts of each layer in memory | perplexity on held-out text, to all experts |"
        return "\n".join([text, head, "|---|---|", *rows]) + "\n"


def dropout_record(config: Any) -> ExpertDropoutRecord | None:
    """Return the record of a model's configuration; None if it was trained without expert dropout.

    Args:
        config: A configuration of transformers, or one of ours.

    Raises:
        CheckpointError: The entry is damaged.
    """
    entry = getattr(config, KEY, None)
    if entry is None:
        return None
    try:
        return _parse(entry)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{KEY} in config.json is damaged ({type(error).__name__}: {error}); restore the file "
            "that was written with the weights, or remove the entry to serve the model without it"
        ) from error


def _parse(entry: Any) -> ExpertDropoutRecord:
    order = entry["order"]
    if order not in get_args(Order):
        raise ValueError(f"order is {order!r}")
    losses = entry.get("held_out_loss")
    return ExpertDropoutRecord(
        order=cast(Order, order),
        share=float(entry["share"]),
        least=int(entry["least"]),
        begin=float(entry["begin"]),
        resident_order=tuple(_permutation(one) for one in entry.get("resident_order") or ()),
        held_out_loss=losses and {int(count): float(loss) for count, loss in losses.items()},
    )


def _permutation(experts: Sequence[Any]) -> tuple[int, ...]:
    found = tuple(int(expert) for expert in experts)
    if sorted(found) != list(range(len(found))):
        raise ValueError("resident_order does not hold every expert of a layer once")
    return found


def order_of_blocks(
    record: ExpertDropoutRecord | None, experts_per_block: Sequence[int]
) -> list[tuple[int, ...] | None]:
    """Return each block's experts in resident order; None for all blocks without such an order.

    Args:
        record: Of the model.
        experts_per_block: Number of experts of each MoE block, in the order of the model.

    Raises:
        CheckpointError: The recorded order is of another model.
    """
    if record is None or not record.resident_order:
        return [None] * len(experts_per_block)
    recorded = [len(order) for order in record.resident_order]
    if recorded != list(experts_per_block):
        raise CheckpointError(
            f"{KEY} in config.json orders {recorded} experts per layer, but the model has "
            f"{list(experts_per_block)}; restore the file that was written with the weights, or "
            "remove the entry to serve the model without it"
        )
    return list(record.resident_order)
