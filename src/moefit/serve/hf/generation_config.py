"""Generation settings of a checkpoint, from generation_config.json.

`use_generation_config` sets what transformers' `generate` follows and returns the defaults that the
engine applies to requests. Without the file, settings in config.json are used, as transformers
does, but not those for sampling.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moefit.checkpoint.config import read_config
from moefit.checkpoint.model_folder import read_json, settings_file
from moefit.errors import CheckpointError
from moefit.folders import is_gguf

FILE = "generation_config.json"
AUTO, NONE, IGNORE = "auto", "none", "ignore"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
# Accelerations that need layers or caches that a served model does not have, and settings that
# return several sequences or more than tokens.
_NOT_FOR_GENERATE = (
    "use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit", "speculation_type",
    "cache_implementation", "cache_config", "max_cache_len", "compile_config",
    "num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits",
    "output_attentions", "output_hidden_states",
    "remove_invalid_values",  # samples from logits that are not finite
)  # fmt: skip
# Settings that transformers implements with code from the Hub, which moefit never runs.
HUB_CODE = (
    "dola_layers", "constraints", "force_words_ids", "num_beam_groups", "diversity_penalty",
    "penalty_alpha",
)  # fmt: skip
# Settings that the engine does not implement, with the values that have no effect.
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
    """Tokens that must not be generated.

    Attributes:
        always: Tokens suppressed at every position.
        first: Tokens suppressed as the first generated token.
        sequences: Sequences of two or more tokens that must not occur, also across the prompt's
            end.
    """

    always: frozenset[int] = frozenset()
    first: frozenset[int] = frozenset()
    sequences: tuple[tuple[int, ...], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.always or self.first or self.sequences)

    @property
    def longest(self) -> int:
        """Return the number of previous tokens that `now` needs."""
        return max((len(sequence) - 1 for sequence in self.sequences), default=0)

    def now(self, before: Sequence[int], *, first: bool) -> set[int]:
        """Return the tokens that must not be generated next.

        Args:
            before: The last tokens of prompt and output, at least `longest`.
            first: Whether no token has been generated yet.

        >>> sorted(Suppressed(sequences=((1, 2, 3), (9, 4))).now([1, 2], first=True))
        [3]
        """
        tail = tuple(before)
        ended = {one[-1] for one in self.sequences if tail[-len(one) + 1 :] == one[:-1]}
        return ended | self.always | (self.first if first else frozenset())


NOT_SUPPRESSED = Suppressed()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Generation settings of a checkpoint that the engine applies to requests.

    Attributes:
        temperature: Default of requests, as the four below; None if the file has none. 0 if the
            file has `do_sample: false`.
        top_p: See `temperature`.
        top_k: See `temperature`.
        min_p: See `temperature`.
        repetition_penalty: See `temperature`.
        start: The decoder's start token of an encoder-decoder model.
        suppressed: Tokens that are suppressed in every request.
        unfollowed: Names of settings that change the output but are not implemented by the engine.
            `generate` implements them, except `HUB_CODE`.
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
        """Return the sampling settings that the file has."""
        settings = {name: getattr(self, name) for name in SAMPLING}
        return {name: value for name, value in settings.items() if value is not None}


def use_generation_config(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    follow: str = AUTO,
) -> GenerationDefaults:
    """Set a model's `generation_config` from its checkpoint.

    Args:
        model: The model; its `generation_config` is replaced.
        folder: Folder of the checkpoint.
        tokenizer: Its end-of-text token is an end token too if generation_config.json has none.
        follow: `auto`; `none` to use only the checkpoint's special tokens; `ignore` to read no
            file, for measurements, which generate nothing.

    Returns:
        The defaults for requests to the engine.

    Raises:
        CheckpointError: generation_config.json is damaged or has an invalid value.
    """
    if not model.can_generate():
        return GenerationDefaults()
    if follow == IGNORE:
        model.generation_config = GenerationConfig()
        _add_special_tokens(model.generation_config, model.config, None)
        return GenerationDefaults()
    settings, own = _read_settings(folder, follow)
    generation = _generation_config(settings, own, folder)
    unfollowed = tuple(
        name
        for name, without_effect in _NOT_FOR_ENGINE.items()
        if getattr(generation, name, None) not in (None, *without_effect)
    )
    generation.stop_strings = None  # these two need a tokenizer at each call
    generation.token_healing = False
    for name in HUB_CODE:
        setattr(generation, name, None)
    has_tokenizer_config = (folder / "tokenizer_config.json").is_file()  # else transformers guesses
    _add_special_tokens(generation, model.config, tokenizer if has_tokenizer_config else None)
    start = (
        _start_token(generation, model.config, folder) if model.config.is_encoder_decoder else None
    )
    model.generation_config = generation
    return GenerationDefaults(
        **(_sampling(settings) if own else {}),
        start=start,
        suppressed=_suppressed(generation, model.config.get_text_config(decoder=True).vocab_size),
        unfollowed=unfollowed,
    )


def _read_settings(folder: Path, follow: str) -> tuple[dict[str, Any], bool]:
    """Return the checkpoint's settings, and whether they are from generation_config.json."""
    own = (folder / FILE).is_file()
    file = folder / FILE if own else settings_file(folder)
    found = read_config(folder) if is_gguf(folder) else _read(file)
    settings = {name: value for name, value in found.items() if name not in _NOT_FOR_GENERATE}
    if follow == NONE:
        settings = {name: settings[name] for name in _TOKENS if name in settings}
    _check(file, settings, _KINDS if own else _KINDS.keys() - {*SAMPLING, "do_sample"})
    return settings, own


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, str(error) or type(error).__name__) from error


def _generation_config(settings: dict[str, Any], own: bool, folder: Path) -> GenerationConfig:
    """Return the configuration for transformers' `generate`."""
    make = GenerationConfig.from_dict if own else GenerationConfig.from_model_config
    try:
        generation = make(settings)
    except Exception as error:  # validation raises many types
        file = folder / FILE if own else settings_file(folder)
        raise _damaged(file, f"{type(error).__name__}: {error}") from error
    for name in _NOT_FOR_GENERATE:  # from_model_config also reads nested configs
        setattr(generation, name, None)
    if generation.temperature == 0:  # invalid for transformers together with do_sample
        generation.temperature, generation.do_sample = None, False
    if generation.top_k == -1:
        generation.top_k = 0
    return generation


def _add_special_tokens(generation: GenerationConfig, config: Any, tokenizer: Any) -> None:
    """Add special tokens that generation_config.json omits, such as the end token."""
    text = config.get_text_config(decoder=True)
    named = bool(_ids(generation.eos_token_id))
    for name in _TOKENS:
        if getattr(generation, name) in (None, []):
            own = getattr(text, name, None)
            setattr(generation, name, getattr(config, name, None) if own is None else own)
    end = getattr(tokenizer, "eos_token_id", None)
    if not named and isinstance(end, int):
        generation.eos_token_id = sorted({*_ids(generation.eos_token_id), end})


def _start_token(generation: GenerationConfig, config: Any, folder: Path) -> int:
    """Return the decoder's start token, chosen as in transformers."""
    start = generation.decoder_start_token_id
    start = generation.bos_token_id if start is None else start
    size = config.get_text_config(decoder=True).vocab_size
    if type(start) is not int or not 0 <= start < size:
        raise CheckpointError(
            f"decoder_start_token_id in {folder / FILE} or config.json is {start!r}, but an answer "
            f"of this model begins with a token from 0 to {size - 1}; correct it, or copy the "
            "file again from where the model is from"
        )
    return start


def _ids(value: Any) -> list[int]:
    """Return the tokens of a setting that is one token, a list or None.

    >>> _ids(5), _ids([5, 6]), _ids(None)
    ([5], [5, 6], [])
    """
    return [value] if isinstance(value, int) else list(value or ())


def _sampling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling fields of `GenerationDefaults`."""
    found = {name: settings[name] for name in SAMPLING if settings.get(name) is not None}
    if settings.get("do_sample") is False:
        found["temperature"] = 0.0
    if "top_k" in found:
        found["top_k"] = max(0, found["top_k"])
    return found


def _suppressed(generation: GenerationConfig, size: int) -> Suppressed:
    """Return the suppressed tokens within the vocabulary.

    End tokens are not suppressed by `bad_words_ids`, as in transformers.
    """
    bad = [
        tuple(one) for one in generation.bad_words_ids or () if all(token < size for token in one)
    ]
    alone = {one[0] for one in bad if len(one) == 1} - set(_ids(generation.eos_token_id))
    return Suppressed(
        always=frozenset(token for token in _ids(generation.suppress_tokens) if token < size)
        | alone,
        first=frozenset(token for token in _ids(generation.begin_suppress_tokens) if token < size),
        sequences=tuple(one for one in bad if len(one) > 1),
    )


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and isfinite(value) and low <= value <= high


def _whole(value: Any) -> bool:
    return type(value) is int


def _tokens(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


def _token_lists(value: Any) -> bool:
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
    "bad_words_ids": (_token_lists, "a list of lists of tokens"),
}


def _check(file: Path, settings: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise CheckpointError for a value of the wrong kind."""
    for name in names:
        fits, wanted = _KINDS[name]
        if (value := settings.get(name)) is not None and not fits(value):
            raise _damaged(file, f"{name} is {repr(value)[:80]}, but it is {wanted}")


def _damaged(file: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be used: {why}; correct it, or copy it again from where the model is from"
    )
