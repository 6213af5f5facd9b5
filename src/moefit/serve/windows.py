"""Token ids that a model is run over: windows of a text, or pairs of a source and its target.

Shapes: B rows, T tokens of a decoder, S tokens of a source.
"""

import hashlib
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

PADDING = -1  # behind the end of a row that is shorter than others


@dataclass(frozen=True, slots=True)
class Windows:
    """Token ids in rows.

    Attributes:
        ids_BT: Ids of the decoder, which predicts each from those before it.
        sources_BS: Of an encoder-decoder, what its encoder reads for each row; else None.
    """

    ids_BT: Tensor
    sources_BS: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids_BT)

    def __getitem__(self, rows: slice) -> Self:
        sources_BS = None if self.sources_BS is None else self.sources_BS[rows]
        return type(self)(self.ids_BT[rows], sources_BS)

    @property
    def context(self) -> int:
        """Most tokens of a row that one side of the model reads."""
        sources = 0 if self.sources_BS is None else self.sources_BS.shape[1]
        return max(self.ids_BT.shape[1] - 1, sources)

    @property
    def targets(self) -> int:
        """Number of tokens that are predicted."""
        return int((self.ids_BT[:, 1:] != PADDING).sum())

    @property
    def source_tokens(self) -> float:
        """Mean tokens of a source; 0 for decoders."""
        if self.sources_BS is None:
            return 0.0
        return float((self.sources_BS != PADDING).sum()) / len(self)

    @property
    def digest(self) -> str:
        """Identifies the text and its tokenization."""
        found = hashlib.sha256(self.ids_BT.numpy().tobytes())
        if self.sources_BS is not None:
            found.update(self.sources_BS.numpy().tobytes())
        return found.hexdigest()[:16]

    def ids(self, row: int) -> Tensor:
        """Return the decoder's ids of a row, T."""
        return _without_padding(self.ids_BT[row])

    def source(self, row: int) -> Tensor | None:
        """Return what the encoder reads for a row, S; None for decoders."""
        return None if self.sources_BS is None else _without_padding(self.sources_BS[row])

    def inputs(self, row: int, device: torch.device) -> dict[str, Tensor]:
        """Return the arguments of a forward pass that predicts all ids of a row but the first."""
        ids_1T, source_S = self.ids(row)[None, :-1].to(device), self.source(row)
        if source_S is None:
            return {"input_ids": ids_1T}
        return {"input_ids": source_S[None].to(device), "decoder_input_ids": ids_1T}


def _without_padding(ids_T: Tensor) -> Tensor:
    return ids_T[ids_T != PADDING]


def padded(rows: list[Tensor]) -> Tensor:
    """Return rows of ids as one tensor, the shorter ones padded."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
