"""What would the next router find if it knew what the present experts add to the state?

    python benchmarks/next_router_state.py reference --text code.py [--record]

A layer's experts are predicted from the state that the experts of the layer before are given, which
lacks what these add. Three states are compared, by recall of the chosen experts among the first K
and 2K: that state; the same and the gate-weighted mean output of each chosen expert, from vectors
that are fitted on the first three quarters of the text by least squares (no averages do better on
that part); and the same and what the experts really add, which is known when they have been
computed, and bounds what any such estimate finds.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch
from probes import Keeper
from torch import Tensor, nn

import moefit
from moefit.evaluate.decoding import Decoding
from moefit.moe.routing import Routing
from moefit.serve.model import ServedModel

WINDOW = 256
STATES = ("present", "present and mean outputs", "present and true outputs")


class StateKeeper(Keeper):
    """Keeps the weights of experts, too."""

    def __init__(self, served: ServedModel):
        super().__init__(served)
        self.weights: list[list[Tensor]] = [[] for _ in self.inputs]

    def chosen(self, block: int, routing: Routing) -> None:
        super().chosen(block, routing)
        number = self._blocks[block].num_experts
        weights_TE = torch.zeros(len(routing.ids_TK), number + 1)
        weights_TE.scatter_add_(1, routing.ids_TK, routing.weights_TK.float())
        self.weights[block].append(weights_TE[:, :number])


def states_of(layers: Sequence[Any], kept: list[tuple[list[Tensor], list[Tensor]]]) -> list[Any]:
    """Keep each layer's state before its experts' norm, and at its end; return the hooks."""
    hooks = []
    for layer, (before, after) in zip(layers, kept, strict=True):

        def norm(module: nn.Module, given: Any, made: Tensor, into: list[Tensor] = before) -> None:
            into.append(given[0].reshape(-1, given[0].shape[-1]).float().clone())

        def whole(module: nn.Module, given: Any, made: Any, into: list[Tensor] = after) -> None:
            made = made[0] if isinstance(made, tuple) else made
            into.append(made.reshape(-1, made.shape[-1]).float().clone())

        hooks.append(layer.post_attention_layernorm.register_forward_hook(norm))
        hooks.append(layer.register_forward_hook(whole))
    return hooks


def recalls(scores_TE: Tensor, chosen_TE: Tensor) -> tuple[float, float]:
    """Return the shares of chosen experts among the first K and the first 2K."""
    rank_TE, k_T1 = scores_TE.argsort(-1, descending=True).argsort(-1), chosen_TE.sum(-1)[:, None]
    found = [float((chosen_TE & (rank_TE < n * k_T1)).sum() / chosen_TE.sum()) for n in (1, 2)]
    return found[0], found[1]


@torch.inference_mode()
def measure(served: ServedModel, ids_T: Tensor) -> list[dict[str, Any]]:
    base: Any = served.model.base_model
    keeper, layers = StateKeeper(served), base.layers
    kept: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in layers]
    hooks = states_of(layers, kept)
    with served.watched(keeper):
        for ids_L in ids_T.split(WINDOW):
            Decoding(served)(ids_L)
    for one in hooks:
        one.remove()
    predictor, results = served.prefetching.predictor, []
    assert predictor is not None
    cut = 3 * len(ids_T) // 4
    for at in range(len(layers) - 1):
        before_TD, after_TD = (torch.cat(one) for one in kept[at])
        added_TD, weights_TE = after_TD - before_TD, torch.cat(keeper.weights[at])
        means_ED = torch.linalg.lstsq(weights_TE[:cut], added_TD[:cut], driver="gelsd").solution
        guessed_TD = weights_TE @ means_ED
        left = (added_TD - guessed_TD)[cut:].square().sum() / added_TD[cut:].square().sum()
        chosen_TE, row = torch.cat(keeper.choices[at + 1])[cut:], {}
        for name, more_TD in zip(STATES, (0, guessed_TD, added_TD), strict=True):
            x_TD = layers[at].post_attention_layernorm((before_TD + more_TD)[cut:])
            scores_TE = predictor.scores(at, 1, x_TD)
            assert scores_TE is not None, "the norms or routers are not recognised"
            row[name] = recalls(scores_TE, chosen_TE)
        results.append({"layer": at + 1, "unexplained": float(left), "recall_k_and_2k": row})
        print(at + 1, f"unexplained {left:.2f}", row, flush=True)
    means = {
        name: [sum(one["recall_k_and_2k"][name][n] for one in results) / len(results)
               for n in (0, 1)]
        for name in STATES
    }  # fmt: skip
    print(means)
    return [*results, {"layer": "all", "recall_k_and_2k": means}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=12288, help="a quarter is for measuring")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    served = moefit.load(given.model, prefetch="on", context=WINDOW, dtype=torch.float32)
    text = given.text.read_text(encoding="utf-8", errors="replace")[: 8 * given.tokens]
    ids_T = torch.tensor(served.tokenizer(text)["input_ids"][: given.tokens])
    results = measure(served, ids_T)
    if given.record:
        notes = (
            f"{Path(given.model).name}, {len(ids_T)} tokens of {given.text.name} in windows of "
            f"{WINDOW}; means fitted on three quarters, recall at K and 2K on the rest."
        )
        print(record.write("next-router-state", results, notes=notes))


if __name__ == "__main__":
    main()
