"""Trained linear probes beside the next router: which experts will a layer choose, d layers ahead?

A model reads a text; each layer's expert inputs and router logits are kept. Per layer and depth, a
linear map of the inputs is fitted to the later router's log-probabilities on the first part (KL, by
AdamW from the next router's own weights), and recall among the K chosen is measured on the rest,
beside the later router applied to the same inputs without training.
"""

import argparse
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor
from torch.nn import functional as F

import moefit
from moefit.evaluate.decoding import Decoding
from moefit.moe.routing import Routing
from moefit.serve.model import ServedModel

WINDOW = 256


class Keeper:
    """A `StepWatcher` that keeps inputs, choices and logits of each layer."""

    def __init__(self, served: ServedModel):
        self._blocks = list(served.blocks.values())
        self.inputs: list[list[Tensor]] = [[] for _ in self._blocks]
        self.choices: list[list[Tensor]] = [[] for _ in self._blocks]
        self.logits: list[list[Tensor]] = [[] for _ in self._blocks]

    def chosen(self, block: int, routing: Routing) -> None:
        number, logits = self._blocks[block].num_experts, self._blocks[block].state.logits_TE
        mask_TE = torch.zeros(len(routing.ids_TK), number + 1, dtype=torch.bool)
        self.choices[block].append(mask_TE.scatter_(1, routing.ids_TK, True)[:, :number])
        assert logits is not None
        self.logits[block].append(logits.reshape(-1, number).float().clone())

    def read(self, block: int, x_TD: Tensor) -> None:
        self.inputs[block].append(x_TD.float().clone())

    def computed(self, block: int) -> None:
        pass


def recall(scores_TE: Tensor, chosen_TE: Tensor) -> float:
    """Return the share of chosen experts among as many with the highest scores."""
    order_TE = scores_TE.argsort(-1, descending=True).argsort(-1)
    found_TE = chosen_TE & (order_TE < chosen_TE.sum(-1, keepdim=True))
    return float(found_TE.sum() / chosen_TE.sum())


def fitted(x_TD: Tensor, logits_TE: Tensor, start_ED: Tensor | None, epochs: int) -> Any:
    """Return weight and bias of a probe, fitted by KL to the router's probabilities."""
    scale_D = x_TD.std(0).clamp_min(1e-6)
    n_TD, p_TE = x_TD / scale_D, logits_TE.softmax(-1)
    shape = logits_TE.shape[1], x_TD.shape[1]
    weight = torch.zeros(shape) if start_ED is None else start_ED * scale_D
    weight, bias = weight.clone().requires_grad_(), torch.zeros(shape[0], requires_grad=True)
    steps = max(1, epochs * len(n_TD) // 512)
    optimizer = torch.optim.AdamW([weight, bias], lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        at = torch.randint(len(n_TD), (512,), generator=generator)
        made_TE = F.linear(n_TD[at], weight, bias).log_softmax(-1)
        loss = F.kl_div(made_TE, p_TE[at], reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (weight / scale_D).detach(), bias.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=12288, help="a quarter is for measuring")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    served = moefit.load(given.model, prefetch="on", context=WINDOW, dtype=torch.float32)
    keeper = Keeper(served)
    text = given.text.read_text(encoding="utf-8", errors="replace")[: 8 * given.tokens]
    ids_T = torch.tensor(served.tokenizer(text)["input_ids"][: given.tokens])
    with torch.inference_mode(), served.watched(keeper):
        for ids_L in ids_T.split(WINDOW):
            Decoding(served)(ids_L)
    x, chosen, logits = (
        [torch.cat(one).clone() for one in lists]
        for lists in (keeper.inputs, keeper.choices, keeper.logits)
    )
    cut, results, predictor = 3 * len(x[0]) // 4, [], served.prefetching.predictor
    assert predictor is not None
    for depth in range(1, 5):
        rows = []
        for at in range(len(x) - depth):
            there = at + depth
            with torch.inference_mode():
                plain_TE = predictor.scores(at, depth, x[at][cut:])
            if plain_TE is None:
                continue
            width = x[at].shape[1]
            with torch.inference_mode():
                start_ED = predictor.scores(at, depth, torch.eye(width)).T.clone()
            weight, bias = fitted(x[at][:cut], logits[there][:cut], start_ED.clone(), given.epochs)
            trained_TE = F.linear(x[at][cut:], weight, bias)
            rows.append((recall(plain_TE, chosen[there][cut:]),
                         recall(trained_TE, chosen[there][cut:])))  # fmt: skip
        plain, trained = (sum(one) / len(one) for one in zip(*rows, strict=True))
        results.append({"depth": depth, "next_router": plain, "probe": trained, "layers": rows})
        print(depth, f"next router {plain:.3f}, probe {trained:.3f}", flush=True)
    if given.record:
        notes = (
            f"{Path(given.model).name}, {len(ids_T)} tokens of {given.text.name} in windows of "
            f"{WINDOW}; probes fitted on three quarters, recall at K on the rest."
        )
        print(record.write("probes", results, notes=notes))


if __name__ == "__main__":
    main()
