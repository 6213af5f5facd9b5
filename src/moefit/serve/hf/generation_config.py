"""How a checkpoint wants its text generated: generation_config.json.

Owns reading the file, what of it transformers' `generate` gets, and what of it requests to the
engine get. Without the file config.json stands for it, as in transformers, but not for sampling.
Knows nothing of requests.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moefit.errors import CheckpointError

FILE = "generation_config.json"
AUTO, NONE = "auto", "none"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# Ways to be fast that need layers or caches that a served model has not, and several answers or
# more than tokens where one text is wanted.
_NOT_FOR_GENERATE = (
    "use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit", "speculation_type",
    "cache_implementation", "cache_config", "max_cache_len", "compile_config",
    "num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits",
    "output_attentions", "output_hidden_states",
    "remove_invalid_values",  # makes tokens of logits that are no numbers
)  # fmt: skip
# What transformers does only with code from the Hub, which is never run.
HUB_CODE = (
    "dola_layers", "constraints", "force_words_ids", "num_beam_groups", "diversity_penalty",
    "penalty_alpha",
)  # fmt: skip
# What changes answers and the engine does not do, with the values that change nothing.
_NOT_FOR_ENGINE: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "penalty_alpha": (0,), "diversity_penalty": (0,),
    "typical_p": (1,), "top_h": (), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "min_length": (0,), "min_new_tokens": (0,), "sequence_bias": ([], {}),
    "exponential_decay_length_penalty": (), "guidance_scale": (1,), "watermarking_config": (),
    "stop_strings": ([], ""), "token_healing": (False,), "dola_layers": (), "constraints": ([],),
    "force_words_ids": ([],),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Suppressed:
    """Tokens that an answer may not have.

    always: anywhere. first: as its first token. sequences: two tokens or more that may not follow
    each other, prompt included.
    """

    always: frozenset[int] = frozenset()
    first: frozenset[int] = frozenset()
    sequences: tuple[tuple[int, ...], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.always or self.first or self.sequences)

    @property
    def longest(self) -> int:
        """How many tokens before the next one decide about it."""
        return max((len(sequence) - 1 for sequence in self.sequences), default=0)

    def now(self, before: Sequence[int], *, first: bool) -> set[int]:
        """The tokens that may not come next.

        Args:
            before: The last tokens of prompt and answer, `longest` of them or more.
            first: Whether the answer has no token yet.

        >>> sorted(Suppressed(sequences=((1, 2, 3), (9, 4))).now([1, 2], first=True))
        [3]
        """
        tail = tuple(before)
        ended = {one[-1] for one in self.sequences if tail[-len(one) + 1 :] == one[:-1]}
        return ended | self.always | (self.first if first else frozenset())


NOT_SUPPRESSED = Suppressed()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What applies where a request says nothing, and what applies to every request.

    temperature to repetition_penalty: of generation_config.json, None where it has none;
    temperature 0 stands for its `do_sample: false`. start: the token with which an encoder-decoder
    model's answer begins. unfollowed: settings that change answers, and that the engine does not
    do; `generate` does none of `HUB_CODE` among them.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    start: int | None = None
    suppressed: Suppressed = NOT_SUPPRESSED
    unfollowed: tuple[str, ...] = ()

    def sampling(self) -> dict[str, float | int]:
        """The settings of sampling that the file has."""
        given = {name: getattr(self, name) for name in SAMPLING}
        return {name: value for name, value in given.items() if value is not None}


def use_generation_config(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    follow: str = AUTO,
) -> GenerationDefaults:
    """Give a model the generation configuration of its checkpoint.

    Args:
        model: Its `generation_config` is replaced.
        folder: Of the checkpoint.
        tokenizer: Its end-of-text token ends answers too if generation_config.json names none.
        follow: `auto`, or `none` to take nothing but special tokens from the checkpoint.

    Returns:
        What requests to the engine follow.

    Raises:
        CheckpointError: generation_config.json cannot be read, or has a value that cannot be.
    """
    if not model.can_generate():
        return GenerationDefaults()
    given, own = _given(folder, follow)
    made = _made(given, own, folder)
    unfollowed = tuple(name for name in _NOT_FOR_ENGINE if _matters(made, name))
    made.stop_strings = None  # `generate` would ask for a tokenizer each time
    made.token_healing = False  # and here too
    for name in HUB_CODE:
        setattr(made, name, None)
    stated = (folder / "tokenizer_config.json").is_file()  # else it is a guess of transformers'
    _complete(made, model.config, tokenizer if stated else None)
    start = _start(made, model.config, folder) if model.config.is_encoder_decoder else None
    model.generation_config = made
    return GenerationDefaults(
        **(_sampling(given) if own else {}),
        start=start,
        suppressed=_suppressed(made, model.config.get_text_config(decoder=True).vocab_size),
        unfollowed=unfollowed,
    )


def _given(folder: Path, follow: str) -> tuple[dict[str, Any], bool]:
    """What the checkpoint says, and whether generation_config.json says it."""
    own = (folder / FILE).is_file()
    file = folder / (FILE if own else "config.json")
    given = {name: value for name, value in _read(file).items() if name not in _NOT_FOR_GENERATE}
    if follow == NONE:
        given = {name: given[name] for name in _TOKENS if name in given}
    _check(file, given, _KINDS if own else _KINDS.keys() - {*SAMPLING, "do_sample"})
    return given, own


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, str(error) or type(error).__name__) from error
    if not isinstance(found, dict):
        raise _damaged(file, "it is no JSON object")
    return found


def _made(given: dict[str, Any], own: bool, folder: Path) -> GenerationConfig:
    """What transformers' `generate` follows."""
    make = GenerationConfig.from_dict if own else GenerationConfig.from_model_config
    try:
        made = make(given)
    except Exception as error:  # it validates in many ways
        file = folder / (FILE if own else "config.json")
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    for name in _NOT_FOR_GENERATE:  # these may have come from what is nested in config.json
        setattr(made, name, None)
    if made.temperature == 0:  # transformers refuses it where it is to sample
        made.temperature, made.do_sample = None, False
    if made.top_k == -1:
        made.top_k = 0
    return made


def _complete(made: GenerationConfig, config: Any, tokenizer: Any) -> None:
    """Fill in tokens that generation_config.json leaves out, or answers would never end."""
    text = config.get_text_config(decoder=True)
    named = bool(_ids(made.eos_token_id))
    for name in _TOKENS:
        if getattr(made, name) in (None, []):
            own = getattr(text, name, None)
            setattr(made, name, getattr(config, name, None) if own is None else own)
    end = getattr(tokenizer, "eos_token_id", None)
    if not named and isinstance(end, int):
        made.eos_token_id = sorted({*_ids(made.eos_token_id), end})


def _start(made: GenerationConfig, config: Any, folder: Path) -> int:
    """The token with which an answer of an encoder-decoder model begins, as transformers has it."""
    start = made.decoder_start_token_id
    start = made.bos_token_id if start is None else start
    size = config.get_text_config(decoder=True).vocab_size
    if type(start) is not int or not 0 <= start < size:
        raise CheckpointError(
            f"decoder_start_token_id in {folder / FILE} or config.json is {start!r}, but an answer "
            f"of this model begins with a token from 0 to {size - 1}; correct it, or copy the "
            "file again from where the model is from"
        )
    return start


def _ids(given: Any) -> list[int]:
    """Tokens of a setting that is one, several or none.

    >>> _ids(5), _ids([5, 6]), _ids(None)
    ([5], [5, 6], [])
    """
    return [given] if isinstance(given, int) else list(given or ())


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `GenerationDefaults` from generation_config.json."""
    found = {name: given[name] for name in SAMPLING if given.get(name) is not None}
    if given.get("do_sample") is False:
        found["temperature"] = 0.0
    if "top_k" in found:
        found["top_k"] = max(0, found["top_k"])
    return found


def _suppressed(made: GenerationConfig, size: int) -> Suppressed:
    """Tokens that exist, and may not be; ends are never among single bad words, as in transformers.

    size: of the vocabulary.
    """
    bad = [tuple(one) for one in made.bad_words_ids or () if all(token < size for token in one)]
    alone = {one[0] for one in bad if len(one) == 1} - set(_ids(made.eos_token_id))
    return Suppressed(
        always=frozenset(token for token in _ids(made.suppress_tokens) if token < size) | alone,
        first=frozenset(token for token in _ids(made.begin_suppress_tokens) if token < size),
        sequences=tuple(one for one in bad if len(one) > 1),
    )


def _matters(made: GenerationConfig, name: str) -> bool:
    """Whether the setting changes answers."""
    value = getattr(made, name, None)
    return value is not None and value not in _NOT_FOR_ENGINE[name]


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and isfinite(value) and low <= value <= high


def _whole(value: Any) -> bool:
    return type(value) is int


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(_tokens(one) and one and min(one) >= 0 for one in value)


_KINDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": (_number(0, 1e6), "a number, 0 or more"),
    "top_p": (_number(0, 1), "a share, from 0 to 1"),
    "top_k": (lambda value: _whole(value) and value >= -1, "a whole number, 0 or more"),
    "min_p": (_number(0, 1), "a share, from 0 to 1"),
    "repetition_penalty": (_number(0.01, 100), "a factor from 0.01 to 100"),
    "eos_token_id": (lambda value: _whole(value) or _tokens(value), "a token, or a list of them"),
    "bos_token_id": (_whole, "a token"),
    "pad_token_id": (_whole, "a token"),
    "decoder_start_token_id": (_whole, "a token"),
    "suppress_tokens": (_tokens, "a list of tokens"),
    "begin_suppress_tokens": (_tokens, "a list of tokens"),
    "bad_words_ids": (_words, "a list of lists of tokens"),
}


def _check(file: Path, given: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise CheckpointError for a value of another kind than it has to be."""
    for name in names:
        fits, wanted = _KINDS[name]
        if (value := given.get(name)) is not None and not fits(value):
            raise _damaged(file, f"{name} is {repr(value)[:80]}, but it is {wanted}")


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be used: {why}; correct it, or copy it again from where the model is from"
    )
