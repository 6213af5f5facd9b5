"""Train a small Switch Transformer to restore clauses from their content words.

    python benchmarks/train_switch.py TEXTS OUT [--steps N] [--expert-dropout nested --start RUN]

TEXTS is a folder of text files, of which every eighth is held out. The learning rate is constant
for 60% of the steps, then falls to zero. With `--expert-dropout` half of the sequences of that last
part are computed a second time, with only some experts and their own output with all as target.
`--start` takes weights and optimiser of another run from where that part begins, so that the two
runs differ in it alone. A run that was stopped goes on where it was.

Shapes: B sequences, T tokens, L MoE blocks, E experts.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from sentence_task import Pair, copied, frequent_words, pairs, rouge_2, tokenizer_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    PreTrainedTokenizerFast,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
)

from moefit.dsmoe.losses import load_balancing_loss, z_loss
from moefit.moe.routing import Rule, route_allowed
from moefit.train.memory.expert_dropout import ExpertDropout, set_record
from moefit.train.settings import ExpertDropoutConfig

BEGIN = 0.6  # of the steps, before the learning rate falls
WARM_UP, DECAY, CLIP = 200, 0.01, 1.0
BALANCE, Z = 0.01, 0.001
CALIBRATION_BATCHES = 8
SAVE_EVERY = 100
POOL = 32  # batches whose sequences are sorted by length


def main() -> None:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = own_tokenizer(arguments)
    encoded = encode(arguments, tokenizer)
    model = new_model(arguments, len(tokenizer))
    run = Run(model, encoded, arguments)
    run.train()
    model.eval().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    held_out = pairs(arguments.texts, tokenizer.get_vocab(), held_out=True)
    test = held_out[: arguments.test]
    scores = rouge_2(restored(model, tokenizer, test), [one.target for one in test])
    found = {"rouge_2": fmean(scores), "copied": copied(test), "pairs": len(test)}
    (arguments.out / "scores.json").write_text(json.dumps(found))
    print(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--expert-dropout", choices=("random", "nested", "mixed"))
    parser.add_argument("--start", type=Path, help="a run without expert dropout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test", type=int, default=200)
    return parser.parse_args()


def own_tokenizer(arguments: argparse.Namespace) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the run that this one starts from, or a new one."""
    for folder in filter(None, (arguments.out, arguments.start)):
        if (folder / "tokenizer.json").exists():
            return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = tokenizer_of(frequent_words(arguments.texts))
    tokenizer.save_pretrained(arguments.out)
    return tokenizer


def encode(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> list[tuple[list[int], list[int]]]:
    """Return the ids of sources and targets; they are kept for when a run goes on."""
    file = (arguments.start or arguments.out) / "pairs.pt"
    if not file.exists():
        found = pairs(arguments.texts, tokenizer.get_vocab(), held_out=False)
        sources = tokenizer([one.source for one in found]).input_ids
        targets = tokenizer([one.target for one in found]).input_ids
        torch.save(list(zip(sources, targets, strict=True)), file)
    return torch.load(file)


def new_model(
    arguments: argparse.Namespace, vocabulary: int
) -> SwitchTransformersForConditionalGeneration:
    """Return a model with random weights, every layer sparse."""
    torch.manual_seed(arguments.seed)
    width, layers = arguments.width, arguments.layers
    config = SwitchTransformersConfig(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=32,
        d_ff=2 * width,
        num_heads=width // 32,
        num_layers=layers,
        num_decoder_layers=layers,
        num_sparse_encoder_layers=layers,
        num_sparse_decoder_layers=layers,
        num_experts=arguments.experts,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        decoder_start_token_id=0,  # pyright: ignore
    )
    model = SwitchTransformersForConditionalGeneration(config)
    for router in routers(model):  # transformers' own gives logits of deviation sqrt(width)
        nn.init.normal_(router.classifier.weight, std=width**-0.5)
    return model


def routers(model: nn.Module) -> list[SwitchTransformersTop1Router]:
    """Return the routers of encoder, then decoder."""
    return [one for one in model.modules() if isinstance(one, SwitchTransformersTop1Router)]


class LimitedRouters:
    """Keeps the routers' logits, and limits the experts that each sequence may use.

    Weights are those of serving in virtual mode: a token's best allowed expert gets the weight of
    the router's own choice.
    """

    def __init__(self, model: nn.Module):
        self.logits: dict[int, Tensor] = {}
        self.allowed_LBE: Tensor | None = None
        for block, router in enumerate(routers(model)):
            router.register_forward_hook(self._hook(block))

    def _hook(self, block: int) -> Any:
        def limit(_router: nn.Module, _inputs: Any, output: Any) -> Any:
            mask_BTE, _, logits_BTE = output
            self.logits[block] = logits_BTE
            if self.allowed_LBE is None:
                return None
            allowed_BTE = self.allowed_LBE[block][:, None].expand_as(logits_BTE)
            rule = Rule(kind="top_k", k=1)
            routing = route_allowed(logits_BTE.flatten(0, 1), allowed_BTE.flatten(0, 1), rule)
            ids_BT = routing.ids_TK.view(mask_BTE.shape[:2])
            chosen_BTE = F.one_hot(ids_BT, mask_BTE.shape[-1])
            return chosen_BTE, routing.weights_TK.view(*ids_BT.shape, 1), logits_BTE

        return limit


class Run:
    """One training run with its checkpoint."""

    def __init__(
        self,
        model: SwitchTransformersForConditionalGeneration,
        encoded: list[tuple[list[int], list[int]]],
        arguments: argparse.Namespace,
    ):
        self._model, self._encoded, self._arguments = model, encoded, arguments
        self._routers = LimitedRouters(model)
        self._begin = round(BEGIN * arguments.steps)
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=DECAY, fused=True
        )
        self._dropout = self._new_dropout()
        self._order: list[list[int]] = []
        self._step = 0
        own, start = arguments.out / "state.pt", arguments.start
        if own.exists():
            self._load(own)
        elif start is not None:
            self._load(start / "begin.pt")

    def _new_dropout(self) -> ExpertDropout | None:
        order, config = self._arguments.expert_dropout, self._model.config
        if order is None:
            return None
        return ExpertDropout(
            settings=ExpertDropoutConfig(order=order, begin=BEGIN),
            least=3,
            num_layers=len(routers(self._model)),
            num_experts=config.num_experts,
            seed=self._arguments.seed,
            begin_step=self._begin,
        )

    def train(self) -> None:
        """Train to the last step."""
        self._model.train()
        steps, started, losses = self._arguments.steps, time.perf_counter(), []
        while self._step < steps:
            if self._step == self._begin:
                self._begin_last_part()
            self._step += 1
            losses.append(self._one_step())
            if self._step % 20 == 0:
                speed = 20 / (time.perf_counter() - started)
                print(f"{self._step} loss {fmean(losses):.3f} {speed:.2f} steps/s", flush=True)
                started, losses = time.perf_counter(), []
            if self._step % SAVE_EVERY == 0:
                self._save("state.pt")

    def _begin_last_part(self) -> None:
        if self._dropout is None:
            self._save("begin.pt")
            return
        self._order = self._measured_order()
        set_record(self._model, self._dropout.record(self._order))

    def _one_step(self) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._arguments.lr * self._share_of_lr()
        batch = self._batch(self._step)
        output = self._model(**batch, use_cache=False)
        loss = output.loss + self._router_loss(batch)
        if self._dropout is not None and self._step > self._begin:
            loss = loss + self._distillation(self._dropout, batch, output.logits.detach())
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return output.loss.item()

    def _distillation(
        self, dropout: ExpertDropout, batch: dict[str, Tensor], teacher_BTV: Tensor
    ) -> Tensor:
        """Return the loss of sequences with few experts, against themselves with all."""
        allowed_LBE = dropout.draw(self._step, len(teacher_BTV), self._order)
        few_B = ~allowed_LBE.all(-1).all(0)
        self._routers.allowed_LBE = allowed_LBE[:, few_B]
        student_BTV = self._model(
            **{name: one[few_B] for name, one in batch.items()}, use_cache=False
        ).logits
        self._routers.allowed_LBE = None
        real_BT = batch["labels"][few_B] >= 0
        student_RV = student_BTV[real_BT].log_softmax(-1)
        teacher_RV = teacher_BTV[few_B][real_BT].log_softmax(-1)
        loss = F.kl_div(student_RV, teacher_RV, reduction="sum", log_target=True)
        return few_B.float().mean() * loss / max(1, len(student_RV))

    def _share_of_lr(self) -> float:
        left = (self._arguments.steps - self._step + 1) / (self._arguments.steps - self._begin)
        return min(1.0, self._step / WARM_UP, left)

    def _router_loss(self, batch: dict[str, Tensor]) -> Tensor:
        real_BT = (batch["attention_mask"].bool(), batch["labels"] >= 0)
        total = torch.zeros(())
        for block, logits_BTE in self._routers.logits.items():
            in_decoder = block >= len(self._routers.logits) // 2
            real_T = real_BT[in_decoder].flatten()
            logits_TE = logits_BTE.flatten(0, 1)
            total = total + BALANCE * load_balancing_loss(logits_TE, 1, real_T)
            total = total + Z * z_loss(logits_TE, real_T)
        return total

    def _batch(self, step: int) -> dict[str, Tensor]:
        """Return the batch that seed and step select; sequences of like length are together."""
        size = self._arguments.batch
        pool, at = divmod(step - 1, POOL)
        generator = torch.Generator().manual_seed(self._arguments.seed * 100_003 + pool)
        count = POOL * size
        first = pool * count % (len(self._encoded) - count)
        chosen = sorted(self._encoded[first : first + count], key=lambda one: len(one[1]))
        batches = torch.randperm(POOL, generator=generator)
        mine = chosen[int(batches[at]) * size :][:size]
        return collate(mine)

    @torch.no_grad()
    def _measured_order(self) -> list[list[int]]:
        """Each block's experts in descending order of their router weight."""
        totals = [torch.zeros(self._model.config.num_experts) for _ in routers(self._model)]
        for step in range(1, CALIBRATION_BATCHES + 1):
            batch = self._batch(step)
            self._model(**batch, use_cache=False)
            real_BT = (batch["attention_mask"].bool(), batch["labels"] >= 0)
            for block, logits_BTE in self._routers.logits.items():
                scores_TE = logits_BTE[real_BT[block >= len(totals) // 2]].softmax(-1)
                best_T1, ids_T1 = scores_TE.max(-1, keepdim=True)
                totals[block] += torch.zeros_like(scores_TE).scatter(-1, ids_T1, best_T1).sum(0)
        return [one.argsort(descending=True, stable=True).tolist() for one in totals]

    def _save(self, name: str) -> None:
        state = {
            "step": self._step,
            "order": self._order,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        partial = self._arguments.out / (name + ".part")
        torch.save(state, partial)
        partial.replace(self._arguments.out / name)

    def _load(self, file: Path) -> None:
        state = torch.load(file)
        self._step, self._order = state["step"], state["order"]
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._order and self._dropout is not None:
            set_record(self._model, self._dropout.record(self._order))


def collate(chosen: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Pad a batch."""
    sources = nn.utils.rnn.pad_sequence([torch.tensor(one) for one, _ in chosen], True)
    labels = nn.utils.rnn.pad_sequence([torch.tensor(one) for _, one in chosen], True, -100)
    return {"input_ids": sources, "attention_mask": (sources != 0).long(), "labels": labels}


@torch.inference_mode()
def restored(model: Any, tokenizer: Any, test: list[Pair], batch: int = 50) -> list[str]:
    """Restore clauses, greedily."""

    def of(some: list[Pair]) -> Iterator[str]:
        inputs = tokenizer([one.source for one in some], padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        ids_BT = model.generate(**inputs, max_new_tokens=60, do_sample=False)
        yield from tokenizer.batch_decode(ids_BT, skip_special_tokens=True)

    return [text for at in range(0, len(test), batch) for text in of(test[at : at + batch])]


if __name__ == "__main__":
    main()
