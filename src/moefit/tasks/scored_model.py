"""Log-likelihoods of continuations by a model that moefit loads, whole or inside a memory budget.

A model that is loaded whole reads padded batches. A served one reads sequences of equal length
together, since padding would fetch experts that no text needs.

Shapes: B sequences, T tokens, C tokens of a continuation, V vocabulary, E experts.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moefit.api import folder_of, load
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.errors import ConfigError, UnsupportedModelError
from moefit.evaluate.evaluated_model import EvaluatedModel, evaluated_model
from moefit.evaluate.kernel_experts import use_kernels
from moefit.evaluate.loading import computed_whole, load_full_model
from moefit.moe.routing import Rule, active_experts
from moefit.serve.hf.generation_config import IGNORE
from moefit.serve.hf.guards import refuse_no_numbers
from moefit.serve.layer.router_probe import use_rule
from moefit.serve.model import ServedModel
from moefit.tasks.answers import Answer

WHOLE_CONTEXT = 1 << 62
"""As `prompt_logits`: those of all tokens of the context."""
_NO_LIMIT = 2048  # tokens, for configurations that state none
_LEAST = 2  # tokens: one that is read, one that is predicted


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids of a context and of the continuation that is scored."""

    context: Sequence[int]
    continuation: Sequence[int]

    def read(self, most: int) -> list[int]:
        """Return the ids that the model reads, at most so many: all but the last."""
        return [*self.context, *self.continuation][-(most + 1) : -1]


class ScoredModel:
    """A model under one inference rule.

    Args:
        model: In eval mode.
        tokenizer: The model's.
        folder: Of the checkpoint.
        served: What holds the model inside a memory budget; None if it is loaded whole.
        context: Most tokens of a sequence; None for as many as the model and its budget allow.

    Raises:
        ConfigError: The context is shorter than 2 tokens.
        UnsupportedModelError: The model is an encoder-decoder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        served: ServedModel | None = None,
        context: int | None = None,
    ):
        if model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"{folder} is an encoder-decoder; tasks score what a decoder reads. "
                "Give its perplexity with --text instead of --tasks"
            )
        if context is not None and context < _LEAST:
            raise ConfigError(
                f"--context {context} leaves no room for a question and its answer; give "
                f"{_LEAST} or more"
            )
        self.model, self.tokenizer, self.folder, self.served = model, tokenizer, folder, served
        self.context = context
        self.rule: Rule | None = None
        self._undo = ExitStack()
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        if isinstance(model, DsMoeForCausalLM):
            self.rule = Rule.parse(model.config.inference_rule)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Restore the model's own rule; close a served model."""
        self._undo.close()
        if self.served is not None:
            self.served.close()

    @property
    def evaluated(self) -> EvaluatedModel | None:
        """The model's parameters by rule; None for a family without, or served with slots."""
        whole = self.served is None or isinstance(self.model, DsMoeForCausalLM)
        return evaluated_model(self.model) if whole else None

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence."""
        config = self.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None) or _NO_LIMIT
        if self.served is not None and self.served.budget.total is not None:
            limit = min(limit, self.served.budget.context or limit)
        return min(limit, self.context or limit)

    @property
    def one_at_a_time(self) -> bool:
        """Whether answers would depend on which sequences are read together."""
        return self.rule is not None and self.rule.kind == "threshold_top_k"

    def use(self, rule: Rule) -> None:
        """Use a rule from now on.

        Raises:
            ConfigError: It selects more experts than there are.
            UnsupportedModelError: The model does not support it.
        """
        self._undo.close()
        if self.served is not None:
            use_rule(self.model, rule)
        else:
            evaluated = evaluated_model(self.model)
            evaluated.check(rule)
            self._undo.enter_context(evaluated.use(rule))
        self.rule = rule

    def batches(self, requests: Sequence[Request], size: int) -> Iterator[list[int]]:
        """Yield the indices of requests that are read together, the longest first.

        Args:
            requests: All requests.
            size: Most sequences of a batch; of a served model, no more than fit in its context,
                and only one under a rule that computes its number of experts over the batch.
        """
        size = 1 if self.one_at_a_time else size
        lengths = [len(one.read(self.max_length)) for one in requests]
        batch: list[int] = []
        for index in sorted(range(len(requests)), key=lambda i: -lengths[i]):
            first = lengths[batch[0]] if batch else lengths[index]
            full = len(batch) >= size
            if self.served is not None:
                full = full or lengths[index] != first
                full = full or (len(batch) + 1) * first > self.max_length
            if batch and full:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Score one batch.

        Args:
            requests: Of equal length, if the model is served.

        Raises:
            CheckpointError: The model's output is not finite.
        """
        rows = [one.read(self.max_length) for one in requests]
        longest = max(map(len, rows))
        ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        keep = longest - min(
            len(row) - len(one.continuation) for row, one in zip(rows, requests, strict=True)
        )
        output = self._forward(ids_BT, mask_BT, keep)
        logits_BTV = output.logits[:, -keep:]
        counts = self._experts(output, mask_BT)
        return [
            self._answer(request, len(row), logits_TV[len(row) - longest + keep - contlen :], used)
            for request, row, logits_TV, used in zip(
                requests, rows, logits_BTV, counts, strict=True
            )
            for contlen in [len(request.continuation)]
        ]

    def generate(self, context: Sequence[int], most: int, until: Sequence[str]) -> str:
        """Continue a context greedily up to a text of `until`, which is not returned."""
        most = min(most, self.max_length - 1)
        ids_1T = torch.tensor([list(context)[-(self.max_length - most) :]])
        made = self.model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids_1T.to(self.model.device),
            attention_mask=torch.ones_like(ids_1T).to(self.model.device),
            max_new_tokens=most,
            do_sample=False,
            tokenizer=self.tokenizer,
            **({"stop_strings": list(until)} if until else {}),
        )
        text = self.tokenizer.decode(made[0, ids_1T.shape[1] :], skip_special_tokens=True)
        assert isinstance(text, str)
        for stop in until:
            text = text.split(stop)[0]
        return text

    @property
    def _counts(self) -> bool:
        return self.rule is not None and self.rule.kind.startswith("threshold")

    def _forward(self, ids_BT: Tensor, mask_BT: Tensor, keep: int) -> Any:
        device = self.model.device
        padded = not bool(mask_BT.all())
        output = self.model(
            input_ids=ids_BT.to(device),
            use_cache=False,
            **({"attention_mask": mask_BT.to(device)} if padded else {}),
            **({"logits_to_keep": keep} if self._keeps else {}),
            **({"output_router_logits": True} if self._counts else {}),
        )
        refuse_no_numbers(output.logits)
        return output

    def _experts(self, output: Any, mask_BT: Tensor) -> list[tuple[float, float]]:
        """Return each sequence's active MLP and attention experts, summed over its tokens."""
        if not self._counts:
            return [(0.0, 0.0)] * len(mask_BT)
        assert self.rule is not None
        # Of attention experts, only `threshold` deactivates any.
        attention = output.attention_router_logits if self.rule.kind == "threshold" else ()
        kinds = output.router_logits, attention
        sums = [_summed(logits, self.rule, mask_BT) for logits in kinds]
        return list(zip(*sums, strict=True))

    def _answer(
        self, request: Request, length: int, logits_TV: Tensor, used: tuple[float, float]
    ) -> Answer:
        count = len(request.continuation)
        targets_C = torch.tensor(list(request.continuation), device=logits_TV.device)
        row_CV = logits_TV[:count].float().log_softmax(-1)
        chosen_C = row_CV.gather(-1, targets_C[:, None])[:, 0]
        greedy = bool((row_CV.argmax(-1) == targets_C).all())
        return Answer(float(chosen_C.sum()), greedy, length, *used)


def load_scored(
    model: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    context: int | None = None,
    **settings: Any,
) -> ScoredModel:
    """Load a model to score.

    Args:
        model: A folder, a training run, a name on the Hub, or `reference`.
        device: Where to compute.
        dtype: Of weights that are not encoded; None for the checkpoint's own.
        context: Most tokens of a sequence; None for as many as the model and its budget allow.
        settings: Further keyword arguments of `moefit.load`, such as `memory`. Without any, a
            DS-MoE or OLMoE is loaded whole.

    Raises:
        MoefitError: As `moefit.load` and `load_full_model` do.
    """
    folder = folder_of(model)
    if not settings and computed_whole(folder):
        loaded, tokenizer = load_full_model(str(folder), device=device, dtype=dtype)
        use_kernels(loaded)
        return ScoredModel(loaded, tokenizer, folder, context=context)
    how = {"prompt_logits": WHOLE_CONTEXT, "generation_config": IGNORE, **settings}
    if context is not None:
        how["context"] = context
    return scored(load(model, device=device, dtype=dtype, **how), context=context)


def scored(served: ServedModel, context: int | None = None) -> ScoredModel:
    """Wrap a served model, which `ScoredModel.close` closes. Raises as `ScoredModel` does."""
    try:
        return ScoredModel(served.model, served.tokenizer, served.folder, served, context)
    except (ConfigError, UnsupportedModelError):
        served.close()
        raise


def _summed(logits: Sequence[Tensor], rule: Rule, mask_BT: Tensor) -> list[float]:
    """Return the active experts by sequence: summed over its tokens, the mean over layers."""
    if not logits:
        return [0.0] * len(mask_BT)
    real_T = mask_BT.flatten().bool()
    total_T = torch.zeros(len(real_T))
    for layer in logits:
        scores_TE = layer.flatten(0, -2).float().softmax(-1).cpu()
        total_T += active_experts(scores_TE, rule, real_T).sum(-1).float()
    return ((total_T / len(logits)) * real_T).view(mask_BT.shape).sum(-1).tolist()
