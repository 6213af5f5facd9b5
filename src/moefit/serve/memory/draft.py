"""The draft model: a smaller model of the same vocabulary that guesses what follows.

Says how it is loaded and refuses one whose tokens are not the served model's. It is held whole, in
the checkpoint's own format, beside the served model and within the same budget.
"""

from pathlib import Path

from moefit.checkpoint.tokenizer import read_tokenizer
from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError
from moefit.serve.config import LoadSettings
from moefit.serve.hf.generation_config import IGNORE
from moefit.serve.hf.skeleton import Skeleton, build_skeleton

DRAFT_STEP = 128
"""Most tokens of one step of a draft model, besides one for each request."""
_TOKENIZER = "tokenizer.json"


def draft_settings(settings: LoadSettings) -> LoadSettings:
    """Return how the draft model of a model with these settings is loaded."""
    return LoadSettings(
        device=settings.device,
        context=settings.context,
        dtype=settings.dtype,
        sequences=settings.sequences,
        readers=1,
        generation_config=IGNORE,
    )


def draft_skeleton(settings: LoadSettings) -> Skeleton:
    """Return the draft model without weights.

    Args:
        settings: Of the served model, with `draft`.

    Raises:
        CheckpointError: Its checkpoint is missing or damaged.
        UnsupportedModelError: It is an encoder-decoder.
    """
    assert settings.draft is not None
    skeleton = build_skeleton(Path(settings.draft), settings.dtype, needs_experts=False)
    if skeleton.model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"the draft model {settings.draft} is an encoder-decoder, which does not continue a "
            "text; give a decoder with the tokenizer of the served model"
        )
    return skeleton


def check_vocabulary(served: Skeleton, draft: Skeleton) -> None:
    """Raise ConfigError if token ids mean something else to the draft model.

    Args:
        served: The served model.
        draft: The draft model.
    """
    own, other = served.checkpoint.folder, draft.checkpoint.folder
    files = [one / _TOKENIZER for one in (own, other)]
    if all(one.is_file() for one in files) and files[0].read_bytes() == files[1].read_bytes():
        return
    tokens, drafted = _tokens(own), _tokens(other)
    if tokens is None and drafted is None:
        sizes = [one.model.config.get_text_config().vocab_size for one in (served, draft)]
        if sizes[0] == sizes[1]:
            return
        why = f"it has {sizes[1]:,} tokens, the served model {sizes[0]:,}"
    elif tokens is None or drafted is None:
        why = f"{own if tokens is None else other} has no tokenizer to compare"
    elif tokens == drafted:
        return
    else:
        number = len(tokens.items() ^ drafted.items())
        why = f"its tokenizer differs in {number:,} entries"
    raise ConfigError(
        f"the draft model {other} does not share the vocabulary of {own}: {why}; give a smaller "
        "model of the same family, or --speculate ngram, which needs none"
    )


def _tokens(folder: Path) -> dict[str, int] | None:
    """Return the ids of all tokens; None without a tokenizer."""
    try:
        return read_tokenizer(folder).get_vocab()
    except CheckpointError:
        return None
