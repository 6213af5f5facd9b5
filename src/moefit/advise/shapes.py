"""Shapes of models that `advise` considers, and how their parameters are counted.

The family is that of Ludziejewski et al. (arXiv 2502.05172): as many layers as heads, heads of 64,
attention of 4 d^2 and SwiGLU MLPs of 9 d^2 parameters per layer, separate embedding and output
head. Each MLP is replaced by E experts of which one is active; granularity G divides each of them
into G small ones (Krajewski et al., arXiv 2402.07871), of which G are active.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

HEAD = 64
VOCABULARY = 50257  # of the GPT-2 tokenizer
_MLP = 3  # hidden units of a whole MLP per unit of width
_MOST_LAYERS = 256
# Ludziejewski et al.: peak learning rate = exp(8.39 - 0.81 ln N - 0.25 ln E), N without embeddings.
_RATE, _RATE_SIZE, _RATE_EXPERTS = 8.39, -0.81, -0.25
_RATE_SIZES = (27e6, 2.5e9)  # N of the models that it was fitted to


class Count(StrEnum):
    """Which parameters a law calls N."""

    active_with_embeddings = "active with embeddings"
    active = "active without embeddings"
    total_with_embeddings = "total with embeddings"
    total = "total without embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One model.

    Attributes:
        width: d.
        layers: Decoder layers.
        experts: E, in units of a whole MLP; 1 is a dense model.
        granularity: G, small experts per whole MLP.
        vocabulary: V.
    """

    width: int
    layers: int
    experts: int = 1
    granularity: int = 1
    vocabulary: int = VOCABULARY

    @property
    def num_experts(self) -> int:
        """Experts of a layer."""
        return self.experts * self.granularity

    @property
    def top_k(self) -> int:
        """Experts that a token uses."""
        return self.granularity

    @property
    def expert_width(self) -> int:
        """Hidden units of one expert."""
        return _MLP * self.width // self.granularity

    @property
    def attention(self) -> int:
        """Parameters of attention, all layers."""
        return 4 * self.width**2 * self.layers

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return 3 * self.width * self.expert_width

    @property
    def embeddings(self) -> int:
        """Parameters of embedding and output head."""
        return 2 * self.vocabulary * self.width

    def count(self, which: Count) -> int:
        """Return the parameters; routers and norms, below a percent, are not counted."""
        is_total = which in (Count.total, Count.total_with_embeddings)
        experts = self.num_experts if is_total else self.top_k
        body = self.attention + experts * self.expert_parameters * self.layers
        with_embeddings = which in (Count.active_with_embeddings, Count.total_with_embeddings)
        return body + self.embeddings * with_embeddings

    @property
    def active(self) -> int:
        """Parameters that a token uses, with embedding and head."""
        return self.count(Count.active_with_embeddings)

    @property
    def total(self) -> int:
        """All parameters, with embedding and head."""
        return self.count(Count.total_with_embeddings)

    def training_flops(self, tokens: float) -> float:
        """Return 6 * active * tokens."""
        return 6 * self.active * tokens

    @property
    def learning_rate(self) -> float:
        """Peak learning rate by the rule above; outside its range, that of the nearest size."""
        least, most = _RATE_SIZES
        size = min(max(self.count(Count.active), least), most)
        logarithm = _RATE + _RATE_SIZE * math.log(size) + _RATE_EXPERTS * math.log(self.experts)
        return math.exp(logarithm)

    def model_fields(self, positions: int) -> dict[str, Any]:
        """Return fields of `DsMoeConfig`.

        Args:
            positions: Longest sequence.
        """
        rule = f"top_k:{self.top_k}" if self.num_experts > 1 else "dense"
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.width // HEAD,
            "num_key_value_heads": self.width // HEAD,
            "head_dim": HEAD,
            "num_experts": self.num_experts,
            "intermediate_size": self.expert_width,
            "mlp_type": "swiglu",
            "training_rule": rule,
            "inference_rule": rule,
            "tie_word_embeddings": False,
            "max_position_embeddings": positions,
        }

    def describe(self) -> str:
        """Return its sizes in words.

        >>> Shape(width=1024, layers=16, experts=8).describe()
        '16 layers of width 1024, 8 experts of width 3072, top-1'
        """
        body = f"{self.layers} layers of width {self.width}"
        if self.num_experts == 1:
            return f"{body}, dense MLPs of width {self.expert_width}"
        experts = f"{self.num_experts} experts of width {self.expert_width}"
        return f"{body}, {experts}, top-{self.top_k}"


def family(experts: int, granularity: int = 1, vocabulary: int = VOCABULARY) -> Iterator[Shape]:
    """Yield the shapes of the family, smallest first: width 64 n, n layers."""
    for layers in range(1, _MOST_LAYERS + 1):
        yield Shape(
            width=HEAD * layers,
            layers=layers,
            experts=experts,
            granularity=granularity,
            vocabulary=vocabulary,
        )


def short_count(number: float) -> str:
    """Return a count with three digits and a suffix.

    >>> short_count(669_000_000), short_count(24.9e9), short_count(8e12)
    ('669 M', '24.9 B', '8 T')
    """
    for size, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"
