"""Decode given tokens with a KV cache, one sequence at a time.

Shapes: T tokens, S tokens of a source, V vocabulary.
"""

from typing import Any

from torch import Tensor

from moefit.cache_argument import forward_with_cache
from moefit.serve.model import ServedModel


class Decoding:
    """One sequence that is decoded. The source of an encoder-decoder is encoded at once.

    Args:
        served: The model.
        source_S: What an encoder reads; None for decoders.
    """

    def __init__(self, served: ServedModel, source_S: Tensor | None = None):
        self._model, self._cache = served.model, None
        self._name, self._fixed = "input_ids", dict[str, Any]()
        if source_S is not None:
            source_1S = source_S[None].to(self._model.device)
            self._name = "decoder_input_ids"
            self._fixed = {"encoder_outputs": self._model.get_encoder()(input_ids=source_1S)}

    def __call__(self, ids_T: Tensor) -> Tensor:
        """Append tokens and return the logits after each, T x V."""
        ids = {self._name: ids_T[None].to(self._model.device)}
        output, self._cache = forward_with_cache(self._model, self._cache, **ids, **self._fixed)
        return output.logits[0]
