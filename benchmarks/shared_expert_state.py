"""What does the next router find if it knows what the present layer's shared expert adds?

    python benchmarks/shared_expert_state.py TOKENS [--steps 800] [--record]

TOKENS is a folder that `moefit train` has prepared (`data.cache_dir`). A small model of Qwen2-MoE's
form (four layers of 16 experts, two of them and a gated shared expert, as wide as both, for each
token) is trained on it with transformers' own code. On held-out text each layer's router is then
applied one layer early to three states: the one that the experts of the layer before are given; the
same and the shared expert's output, which needs no routing and may be computed first; and the same
and all that the layer adds, which is known when its experts have been computed. Recall of the
chosen experts among the first K and 2K, by layer.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

CONTEXT, BATCH, VOCABULARY, CHOSEN = 128, 8, 1024, 2
STATES = ("present", "present and shared expert", "present and all that the layer adds")


def untrained() -> Any:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64 * CHOSEN,
        num_experts=16,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        max_position_embeddings=CONTEXT,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return Qwen2MoeForCausalLM(config)


def rows_of(path: Path) -> Tensor:
    tokens = torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64))
    assert int(tokens.max()) < VOCABULARY, f"{path} has tokens of a larger vocabulary"
    return tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def train(model: Any, ids_NC: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    order, began = torch.randperm(len(ids_NC)), time.process_time()
    for step, rows in enumerate(order[: steps * BATCH].split(BATCH)):
        ids_BC = ids_NC[rows]
        loss = model(input_ids=ids_BC, labels=ids_BC).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(step, f"{float(loss):.3f}", f"{time.process_time() - began:.0f} s", flush=True)


class States:
    """What each layer adds, kept while a model computes."""

    def __init__(self, model: Any):
        self.layers = model.model.layers
        self.before: dict[int, Tensor] = {}
        self.shared: dict[int, Tensor] = {}
        self.added: dict[int, Tensor] = {}
        self.chosen: dict[int, Tensor] = {}
        self.hooks = [hook for at in range(len(self.layers)) for hook in self._hooks(at)]

    def _hooks(self, at: int) -> list[Any]:
        layer = self.layers[at]

        def norm(_module: Any, given: Any, _made: Any) -> None:
            self.before[at] = given[0]

        def shared(_module: Any, given: Any, made: Tensor) -> None:
            gate = layer.mlp.shared_expert_gate(given[0]).sigmoid()
            self.shared[at] = (gate * made).view_as(self.before[at])

        def whole(_module: Any, _given: Any, made: Tensor) -> None:
            self.added[at] = made.view_as(self.before[at])

        def gate(_module: Any, _given: Any, made: Any) -> None:
            self.chosen[at] = made[2]

        return [
            layer.post_attention_layernorm.register_forward_hook(norm),
            layer.mlp.shared_expert.register_forward_hook(shared),
            layer.mlp.register_forward_hook(whole),
            layer.mlp.gate.register_forward_hook(gate),
        ]

    def recalls(self, at: int) -> dict[str, list[float]]:
        """Return recall at K and 2K of the router after layer `at`, by state."""
        there, chosen_TK = self.layers[at + 1], self.chosen[at + 1]
        more = (0, self.shared[at], self.added[at])
        found = {}
        for name, added in zip(STATES, more, strict=True):
            x_TD = there.post_attention_layernorm(self.before[at] + added)
            first_TN = there.mlp.gate(x_TD)[0].topk(2 * CHOSEN, dim=-1).indices
            found[name] = [
                float((chosen_TK[:, :, None] == first_TN[:, None, :n]).any(-1).float().mean())
                for n in (CHOSEN, 2 * CHOSEN)
            ]
        return found


@torch.inference_mode()
def measure(model: Any, ids_NC: Tensor) -> dict[str, Any]:
    model.eval()
    states, losses, layers = States(model), [], []
    rows: list[list[dict[str, list[float]]]] = []
    for ids_BC in ids_NC.split(BATCH):
        losses.append(
            float(model(input_ids=ids_BC, labels=ids_BC, output_router_logits=False).loss)
        )
        for hook in states.hooks:
            hook.remove()
        rows.append([states.recalls(at) for at in range(len(states.layers) - 1)])
        states.hooks = [hook for at in range(len(states.layers)) for hook in states._hooks(at)]
    for at in range(len(states.layers) - 1):
        layers.append(
            {name: np.mean([row[at][name] for row in rows], 0).tolist() for name in STATES}
        )
    means = {name: np.mean([one[name] for one in layers], 0).tolist() for name in STATES}
    return {
        "held_out_loss": float(np.mean(losses)),
        "loss_of_uniform_guesses": math.log(VOCABULARY),
        "recall_k_and_2k_by_layer": layers,
        "recall_k_and_2k": means,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--measured", type=int, default=256, help="held-out windows of 128 tokens")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    model = untrained()
    train(model, rows_of(given.tokens / "train.bin"), given.steps)
    results = measure(model, rows_of(given.tokens / "held_out.bin")[: given.measured])
    print(results)
    if given.record:
        notes = (
            f"{given.steps} steps of {BATCH * CONTEXT} tokens; recall on {given.measured} held-out "
            f"windows of {CONTEXT} tokens, of the second to the last layer's routers."
        )
        print(record.write("shared-expert-state", results, notes=notes))


if __name__ == "__main__":
    main()
