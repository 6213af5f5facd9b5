"""What a served model can be asked: how long, in which tokens, with which texts.

Owns finding that out when the engine is made, and refusing a request that it rules out. Knows
nothing of other requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import GenerationMixin

from moefit.engine.answer import Language
from moefit.engine.request import Sampling
from moefit.engine.sampler import check_sampling
from moefit.errors import ConfigError, RequestTooLargeError, UnsupportedModelError
from moefit.serve.served import ServedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """model: its class. max_model_len: tokens of one request, prompt and answer. vocabulary: tokens
    that there are.
    """

    model: str
    max_model_len: int
    vocabulary: int
    language: Language

    def check(self, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Raise ConfigError for what cannot be, RequestTooLargeError for what is too long."""
        check_sampling(sampling)
        if not prompt_ids:
            raise ConfigError("the prompt has no tokens; give at least one")
        if wrong := [token for token in prompt_ids if not 0 <= token < self.vocabulary]:
            raise ConfigError(
                f"token {wrong[0]} does not exist; the model's are 0 to {self.vocabulary - 1}"
            )
        if wrong := [token for token, _ in sampling.logit_bias if not 0 <= token < self.vocabulary]:
            raise ConfigError(
                f"logit_bias for token {wrong[0]}, which does not exist; the model's are 0 to "
                f"{self.vocabulary - 1}"
            )
        if sampling.stop and self.language.tokenizer is None:
            raise ConfigError("stop texts need a tokenizer, and the model's folder has none")
        if sampling.prompt_logprobs is not None and not self.language.continues:
            raise ConfigError(
                f"{self.model} encodes its prompt and gives no log-probabilities of it; leave "
                "prompt_logprobs (echo) out"
            )
        wanted = len(prompt_ids) + sampling.max_tokens
        if wanted > self.max_model_len:
            room = self.max_model_len - len(prompt_ids)
            fewer = f"max_tokens={room} or less, or " if room > 0 else ""
            raise RequestTooLargeError(
                f"a prompt of {len(prompt_ids):,} tokens and an answer of up to "
                f"{sampling.max_tokens:,} are {wanted:,}, but one request holds at most "
                f"{self.max_model_len:,}; give {fewer}a shorter prompt"
            )


def abilities_of(served: ServedModel, wanted: int | None, context: int) -> Abilities:
    """What this model can be asked. wanted: the tokens of one request, of `context` in all.

    Raises UnsupportedModelError for a model that does not go on token by token, ConfigError for a
    length that it has not.
    """
    model: Any = served.model
    if getattr(type(model), "generate", None) is not vars(GenerationMixin)["generate"]:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not generate text token by token, as requests ask for; "
            "compute with the model itself (moefit.load)"
        )
    text = model.config.get_text_config(decoder=True)
    return Abilities(
        model=type(model).__name__,
        max_model_len=_longest(text, wanted, context),
        vocabulary=text.vocab_size,
        language=_language(served),
    )


def _longest(text_config: Any, wanted: int | None, context: int) -> int:
    own = getattr(text_config, "max_position_embeddings", None)
    most = min(context, own) if isinstance(own, int) and own > 0 else context
    if wanted is not None and wanted > most:
        raise ConfigError(
            f"max_model_len={wanted:,}, but the model and the memory that was reserved hold "
            f"{most:,} tokens; load with a larger context, or give {most:,} or less"
        )
    return wanted or most


def _language(served: ServedModel) -> Language:
    model: Any = served.model
    ends = model.generation_config.eos_token_id
    try:
        tokenizer = served.tokenizer
    except ConfigError:
        tokenizer = None
    return Language(
        tokenizer=tokenizer,
        ends=frozenset([ends] if isinstance(ends, int) else ends or ()),
        continues=not model.config.is_encoder_decoder,
        start=served.generation.start,
        suppressed=served.generation.suppressed,
    )
