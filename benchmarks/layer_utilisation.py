"""The share of each layer's experts that a threshold uses: the DS-MoE paper's Figure 5.

    python benchmarks/layer_utilisation.py NAME=MODEL ... [--rule threshold:0.48] [--save NAME]

MODEL is a training run, scored on its own held-out text, or `reference`, on the held-out standard
library. Draws the mean over tokens by layer, with the tokens between the 10th and the 90th
percentile. Of the paper's figure (3B, WikiText, the same epsilon) the text gives no numbers but
one: attention layers always use over 60% of their experts, and MLP layers far fewer.

Shapes: B sequences, T tokens, E experts.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch
import yaml
from matplotlib.figure import Figure
from paper_in_small import held_out_of_run

from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.evaluate.loading import load_full_model
from moefit.evaluate.passage import held_out_text
from moefit.evaluate.perplexity import Text, score
from moefit.moe.routing import Rule, active_experts
from moefit.train.config import make_config
from moefit.train.data.tokens import prepare

PAPER_ATTENTION = 0.6
"""What every attention layer of the paper's 3B model is above, by its text."""
KINDS = {"mlp": "router_logits", "attention": "attention_router_logits"}
CONTEXT = 512  # of models without a training run


def text_of(model: str, tokenizer: Any, max_tokens: int) -> Text:
    """Return text that the model has not been trained on."""
    settings = Path(model) / "config.yaml"
    if not settings.is_file():
        return held_out_text(tokenizer, CONTEXT, max_tokens)
    config = make_config(yaml.safe_load(settings.read_text()))
    return held_out_of_run(prepare(config.data, seq_len=config.seq_len), config.seq_len, max_tokens)


def shares(logits_BTE: torch.Tensor, rule: Rule) -> torch.Tensor:
    """Return the share of experts [B * T] that each token uses.

    >>> logits = torch.tensor([[[0.0, 0.0, 0.0, 9.0], [1.0, 1.0, 1.0, 1.0]]])
    >>> shares(logits, Rule.parse("threshold:0.48")).tolist()
    [0.25, 1.0]
    """
    return active_experts(logits_BTE.flatten(0, -2).softmax(-1), rule).float().mean(-1)


@torch.inference_mode()
def utilisation(model: DsMoeForCausalLM, text: Text, rule: Rule) -> dict[str, list[dict]]:
    """Return mean and spread over tokens by kind of expert and layer."""
    found: dict[str, list[list[torch.Tensor]]] = {}
    for ids_BT1 in text.batches():
        output = model(input_ids=ids_BT1[:, :-1], use_cache=False, output_router_logits=True)
        for kind, name in KINDS.items():
            for layer, logits_BTE in enumerate(output[name] or ()):
                layers = found.setdefault(kind, [])
                if len(layers) == layer:
                    layers.append([])
                layers[layer].append(shares(logits_BTE, rule))
    return {kind: [_spread(torch.cat(one)) for one in layers] for kind, layers in found.items()}


def _spread(shares_T: torch.Tensor) -> dict[str, float]:
    low, high = torch.quantile(shares_T, torch.tensor([0.1, 0.9])).tolist()
    return {"mean": shares_T.mean().item(), "p10": low, "p90": high}


def draw(results: dict[str, dict[str, Any]], rule: Rule, path: Path) -> None:
    """Draw a panel per model, all with the same height."""
    figure = Figure(figsize=(4.2 * len(results) + 0.6, 4), layout="constrained")
    panels: Sequence[Any] = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for panel, (name, one) in zip(panels, results.items(), strict=True):
        for kind, layers in one["layers"].items():
            where = range(1, len(layers) + 1)
            (line,) = panel.plot(
                where, [at["mean"] for at in layers], "o-", ms=4, label=f"{kind} experts"
            )
            low, high = ([at[key] for at in layers] for key in ("p10", "p90"))
            panel.fill_between(where, low, high, alpha=0.2, color=line.get_color(), lw=0)
        panel.axhline(
            PAPER_ATTENTION, ls="--", lw=1, color="grey", label="paper, 3B: attention is above this"
        )
        panel.set(title=name, xlabel="layer", ylim=(0, 1.02))
        panel.set_xticks(range(1, 1 + max(len(layers) for layers in one["layers"].values())))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="upper right")
    panels[0].set_ylabel(f"share of experts used ({rule}),\nmean and 10th to 90th percentile")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL")
    parser.add_argument("--rule", type=Rule.parse, default=Rule.parse("threshold:0.48"))
    parser.add_argument("--max-tokens", type=int, default=32768)
    parser.add_argument("--save", metavar="NAME")
    given = parser.parse_args()
    results = {}
    for name, place in (one.split("=", 1) for one in given.models):
        model, tokenizer = load_full_model(place, dtype=torch.float32)
        assert isinstance(model, DsMoeForCausalLM)
        text = text_of(place, tokenizer, given.max_tokens)
        layers = utilisation(model, text, given.rule)
        scores = score(model, text, [Rule.parse("dense"), given.rule])
        results[name] = {
            "config": model.config.to_diff_dict(),
            "tokens": text.targets,
            "layers": layers,
            "perplexity": {one.rule: one.perplexity for one in scores},
            "active_share": scores[-1].active_share,
        }
        print(f"{name}:", results[name]["perplexity"], f"{scores[-1].active_share:.0%} active")
        for kind, some in layers.items():
            print(f"{name}, {kind}:", " ".join(f"{one['mean']:.2f}" for one in some))
    if given.save:
        notes = f"share of a layer's experts that a token uses under {given.rule}; float32"
        path = record.write("layer-utilisation", results, notes=notes, suffix=given.save)
        draw(results, given.rule, path.with_suffix(".png"))
        print(path)


if __name__ == "__main__":
    main()
