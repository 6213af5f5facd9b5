"""The model class of lm-evaluation-harness for models that moefit loads.

`register()` adds it to lm-evaluation-harness's registry as `moefit`. `python -m moefit.tasks` is
its own command line with that done: `python -m moefit.tasks run --model moefit --model_args
pretrained=FOLDER,rule=top_k:4 --tasks hellaswag`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from moefit.errors import ConfigError
from moefit.moe.routing import Rule
from moefit.tasks.answers import Answer, AnswerFile, request_key
from moefit.tasks.harness import (
    TemplateLM,
    disjoint,
    model_registry,
    register_model,
    rolling_windows,
    tqdm,
)
from moefit.tasks.scored_model import Request, ScoredModel, load_scored

_BATCH = 8
_NEW_TOKENS = 256


def register() -> None:
    """Register the class with lm-evaluation-harness as `moefit`; may be called repeatedly."""
    if "moefit" not in model_registry:
        register_model("moefit")(MoefitLM)


class MoefitLM(TemplateLM):
    """A model of moefit, as lm-evaluation-harness asks for it.

    Args:
        pretrained: A folder, a training run, a name on the Hub, `reference`, or a loaded model.
        rule: Inference rule of a DS-MoE or OLMoE, such as `top_k:4`; None for the model's own.
        batch_size: Most sequences that are read together.
        device: Where to compute.
        dtype: Of weights that are not encoded, such as `float32`; None for the checkpoint's own.
        answers: Answers that are known, to which the others are added.
        name: Shown beside the progress bar.
        settings: Further keyword arguments of `moefit.load`: `memory`, `mode`, `precision`, ...

    Raises:
        ConfigError: No model is given, or an argument has a value that it cannot have.
        MoefitError: As `load_scored` does.

    Attributes:
        asked: Answers to all requests so far, for what they took.
    """

    def __init__(  # noqa: PLR0913 - lm-evaluation-harness passes keywords
        self,
        pretrained: str | ScoredModel | None = None,
        rule: str | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        answers: AnswerFile | None = None,
        name: str = "moefit",
        max_batch_size: int | None = None,
        **settings: Any,
    ):
        super().__init__()
        if pretrained is None:
            raise ConfigError(
                "no model is given; give its folder, as --model_args pretrained=FOLDER"
            )
        self._size = _batch_size(batch_size, max_batch_size)
        if isinstance(pretrained, ScoredModel):
            self.scored = pretrained
        else:
            how = {"device": _device(device), "dtype": _dtype(dtype), **settings}
            self.scored = load_scored(pretrained, **how)
        if rule is not None:
            self.scored.use(Rule.parse(rule))
        self.tokenizer = self.scored.tokenizer
        self.answers = AnswerFile(None, {}) if answers is None else answers
        self.asked: list[Answer] = []
        self._name = name

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return _one_id(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text without context: the first token of texts, or else their end."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else _one_id(found)

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence."""
        return self.scored.max_length

    @property
    def tokenizer_name(self) -> str:
        """Identifies the tokenizer in lm-evaluation-harness's caches."""
        return str(self.scored.folder).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Return token ids, with special tokens as lm-evaluation-harness's `hf` backend."""
        first = self.tokenizer.bos_token
        if add_special_tokens is None and first is not None and string.startswith(str(first)):
            add_special_tokens = False
        how: Any = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, verbose=False, **how)["input_ids"]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt of a chat, by the model's template."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        assert isinstance(text, str)
        return text

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of the longest context."""
        windows, owners = [], []
        for number, one in enumerate(requests):
            found = rolling_windows(
                token_list=self.tok_encode(one.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(disjoint, found):
                windows.append(((one.args[0], ""), context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (value, _) in zip(owners, scores, strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue texts greedily. Raises ConfigError if a task asks for sampling."""
        made = []
        for one in tqdm(requests, desc=f"{self._name}: texts", disable=disable_tqdm):
            context, settings = one.args
            if settings.get("do_sample") and settings.get("temperature", 1) > 0:
                raise ConfigError(
                    f"the task samples ({settings}), and --model moefit generates greedily; give "
                    "--gen_kwargs do_sample=False"
                )
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            most = int(settings.get("max_gen_toks", _NEW_TOKENS))
            made.append(self.scored.generate(self.tok_encode(context), most, until))
        return made

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-evaluation-harness records of the model."""
        model = self.scored.model
        return {
            "model_num_parameters": sum(p.numel() for p in model.parameters()),
            "model_dtype": str(model.dtype),
            "model_rule": None if self.scored.rule is None else str(self.scored.rule),
        }

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        asked = [Request(context, continuation) for _, context, continuation in requests]
        keys = [request_key(one.context, one.continuation) for one in asked]
        self._refuse_long(asked)
        missing = {key: i for i, key in enumerate(keys) if self.answers.get(key) is None}
        indices = list(missing.values())
        left = [asked[i] for i in indices]
        with tqdm(
            total=len(requests),
            initial=len(requests) - len(left),
            desc=f"{self._name}: log-likelihoods",
            disable=disable_tqdm,
        ) as bar:
            for batch in self.scored.batches(left, self._size):
                answers = self.scored.answer([left[i] for i in batch])
                self.answers.add((keys[indices[i]], a) for i, a in zip(batch, answers, strict=True))
                bar.update(len(batch))
        found = [one for key in keys if (one := self.answers.get(key)) is not None]
        self.asked += found
        return [(one.loglikelihood, one.greedy) for one in found]

    def _refuse_long(self, asked: Sequence[Request]) -> None:
        for one in asked:
            if not one.continuation or len(one.continuation) > self.max_length:
                raise ConfigError(
                    f"a task has a continuation of {len(one.continuation)} tokens, and this model "
                    f"scores 1 to {self.max_length}; give a larger --context, or another task"
                )


def _batch_size(given: int | str | None, most: int | None) -> int:
    """Return the most sequences of a batch; `auto` is not measured."""
    if isinstance(given, str) and given.split(":")[0] == "auto":
        return most or _BATCH
    size = _BATCH if given is None else int(given)
    if size < 1:
        raise ConfigError(f"batch size {size}, but it must be at least 1")
    return size


def _device(name: str | None) -> str:
    """Return the device; lm-evaluation-harness's default, cuda:0, is the CPU without a GPU."""
    return "cpu" if name is None or (name == "cuda:0" and not torch.cuda.is_available()) else name


def _dtype(name: str | None) -> torch.dtype | None:
    if name in (None, "auto"):
        return None
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype {name!r} is unknown; use float32, bfloat16 or float16")
    return found


def _one_id(found: Any) -> int:
    if isinstance(found, int):
        return found
    raise ConfigError(
        "the model's tokenizer has neither a token that begins texts nor one that ends them, and "
        "the task has a text without context; set eos_token in tokenizer_config.json"
    )
