"""Scaling laws as data: coefficients, source, what N and D mean, range and error.

Published laws are in `data/laws.yaml`; `moefit law fit --save` writes files of the same form. A law
applies to the shapes and tokens of its range: outside it a warning names the distance, and beyond a
hundredfold it is refused. Absolute losses of two laws are of different corpora and tokenizers and
are never compared.
"""

import difflib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from moefit.advise.forms import FORMS, EfficiencyLeverage, Form, Points
from moefit.advise.shapes import Count, Shape, short_count
from moefit.errors import ConfigError, in_brief
from moefit.yaml_text import load_yaml

DEFAULT = "ludziejewski"
SUFFIXES = (".yaml", ".yml")
"""Of files of laws."""
REFUSED_BEYOND = 100.0
"""Factor outside a law's range from which it is refused."""
_EXPERTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_GRANULARITIES = (1, 2, 4, 8, 16)
Quantity = Literal[
    "parameters", "tokens", "experts", "granularity", "tokens_per_parameter", "total_parameters"
]
_Part = Literal["activation", "granularity", "flops"]


class Law(BaseModel):
    """A form with coefficients, and what is known about it.

    Attributes:
        name: As given to `--law`.
        form: Name of a form.
        coefficients: Of the form.
        source: Where the coefficients are from.
        counts: Which parameters are N.
        tokens: What D is, in words.
        runs: What was trained, in words.
        error: In words, with its unit.
        ranges: Smallest and largest value of quantities among the runs.
        fixed_tokens: D of all runs, if the law has no term in D.
        ranking_only: Whether only the order of its losses means something.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    form: str
    coefficients: Mapping[str, float]
    source: str
    counts: Count
    tokens: str
    runs: str
    error: str
    ranges: Mapping[Quantity, tuple[float, float]] = {}
    fixed_tokens: float | None = Field(default=None, gt=0)
    ranking_only: bool = False

    @field_validator("form")
    @classmethod
    def _check_form(cls, name: str) -> str:
        if name not in FORMS:
            raise ValueError(f"{name!r} is not a form; use one of {', '.join(FORMS)}")
        return name

    @field_validator("ranges")
    @classmethod
    def _check_ranges(
        cls, ranges: Mapping[Quantity, tuple[float, float]]
    ) -> Mapping[Quantity, tuple[float, float]]:
        for name, (least, most) in ranges.items():
            if not 0 < least <= most:
                raise ValueError(
                    f"{name} from {least:g} to {most:g} is not a range; give [least, most] with "
                    "0 < least <= most"
                )
        return ranges

    @model_validator(mode="after")
    def _check_coefficients(self) -> "Law":
        wanted = set(FORMS[self.form].coefficients)
        if wanted != self.coefficients.keys():
            odd = sorted(wanted.symmetric_difference(self.coefficients))
            raise ValueError(
                f"the form {self.form} has the coefficients {', '.join(sorted(wanted))}; missing "
                f"or unknown: {', '.join(odd)}"
            )
        start, most = (self.coefficients.get(name) for name in ("start", "most"))
        if start is not None and most is not None and not 0 < start < most:
            raise ValueError(f"start {start:g} and most {most:g} must have 0 < start < most")
        return self

    @property
    def formula(self) -> Form:
        """The form."""
        return FORMS[self.form]

    @property
    def experts(self) -> tuple[int, ...]:
        """Numbers of experts to which the law applies: powers of two, or the nearest number."""
        least, most = self.ranges.get("experts", (1, 1))
        found = tuple(one for one in _EXPERTS if least <= one <= most)
        return found or (max(1, round(least)),)

    @property
    def granularities(self) -> tuple[int, ...]:
        """Granularities to which the law applies, of powers of two."""
        least, most = self.ranges.get("granularity", (1, 1))
        return tuple(one for one in _GRANULARITIES if least <= one <= most) or (1,)

    def loss(self, shape: Shape, tokens: float) -> float:
        """Return the loss in nats per token.

        Args:
            shape: Its parameters are counted as the law counts them.
            tokens: Training tokens.
        """
        points = Points(
            parameters=float(shape.count(self.counts)),
            tokens=float(tokens),
            experts=float(shape.experts),
            granularity=float(shape.granularity),
        )
        return float(self.formula.loss(self.coefficients, points))

    def distances(self, shape: Shape, tokens: float) -> dict[Quantity, tuple[float, float]]:
        """Return each quantity outside the range, with its value and the factor outside it."""
        parameters = float(shape.count(self.counts))
        values: dict[Quantity, float] = {
            "parameters": parameters,
            "tokens": tokens,
            "experts": float(shape.experts),
            "granularity": float(shape.granularity),
            "tokens_per_parameter": tokens / parameters,
            "total_parameters": float(shape.total),
        }
        found: dict[Quantity, tuple[float, float]] = {}
        for name, (least, most) in self.ranges.items():
            factor = max(least / values[name], values[name] / most)
            if factor > 1 + 1e-9:
                found[name] = values[name], factor
        return found

    def warnings(self, shape: Shape, tokens: float) -> list[str]:
        """Return a line for each quantity outside the range of the law's runs."""
        return [
            f"{_NAMES[name]} {short_count(value)} is outside the {short_count(least)} to "
            f"{short_count(most)} of {self.name}'s runs, by a factor of {factor:.3g}"
            for name, (value, factor) in self.distances(shape, tokens).items()
            for least, most in (self.ranges[name],)
        ]

    def refuses(self, shape: Shape, tokens: float) -> bool:
        """Return whether a quantity is more than a hundredfold outside the range."""
        distances = self.distances(shape, tokens).values()
        return any(factor > REFUSED_BEYOND for _, factor in distances)


_NAMES: Mapping[Quantity, str] = {
    "parameters": "N =",
    "tokens": "D =",
    "experts": "E =",
    "granularity": "G =",
    "tokens_per_parameter": "D/N =",
    "total_parameters": "total parameters =",
}


class Leverage(BaseModel):
    """The law of efficiency leverage with its source and range; it predicts no loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    coefficients: Mapping[str, float]
    ranges: Mapping[_Part, tuple[float, float]]

    @property
    def formula(self) -> EfficiencyLeverage:
        """The formula with its coefficients."""
        return EfficiencyLeverage(**self.coefficients)

    def of(self, shape: Shape, flops: float) -> tuple[float, list[str]]:
        """Return the leverage of a shape at a budget, and a line per quantity outside the range.

        Its granularity is 2 * width / expert width.
        """
        values: dict[_Part, float] = {
            "activation": shape.top_k / shape.num_experts,
            "granularity": 2 * shape.width / shape.expert_width,
            "flops": flops,
        }
        outside = [
            f"{name} {value:.3g} is outside {least:.3g} to {most:.3g}"
            for name, value in values.items()
            for least, most in (self.ranges[name],)
            if not least <= value <= most
        ]
        leverage = self.formula.leverage(values["activation"], values["granularity"], flops)
        return leverage, outside


@cache
def _published() -> dict[str, Any]:
    text = (files("moefit.advise") / "data" / "laws.yaml").read_text(encoding="utf-8")
    return load_yaml(text)


@cache
def published_laws() -> Mapping[str, Law]:
    """Return the published laws by name, the default first."""
    return {name: Law(name=name, **fields) for name, fields in _published()["laws"].items()}


@cache
def leverage_law() -> Leverage:
    """Return the law of efficiency leverage."""
    return Leverage(**_published()["leverage"])


def find_law(name: str) -> Law:
    """Return a published law, or the one in a file that `moefit law fit --save` wrote.

    Raises:
        ConfigError: There is no such law or file, the file is invalid, or the law predicts no loss.
    """
    laws = published_laws()
    if name in laws:
        return laws[name]
    if Path(name).suffix.lower() in SUFFIXES:
        return _read_law(Path(name))
    if name == "yun":
        raise ConfigError(
            "the coefficients of Yun et al. (arXiv 2404.02852) are not published; fit their form "
            "with `moefit law fit RUNS.csv --form yun --save law.yaml` and give --law law.yaml"
        )
    if name == "leverage":
        raise ConfigError(
            "the law of efficiency leverage predicts no loss, so nothing can be ranked by it; it "
            f"is shown beside the others' results: give --law {DEFAULT}"
        )
    near = difflib.get_close_matches(name, laws, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"{name!r} is not a known law{hint}; use one of {', '.join(laws)}, or a .yaml file from "
        "`moefit law fit --save`"
    )


def _read_law(path: Path) -> Law:
    try:
        tree = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the law {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    laws = tree.get("laws") if isinstance(tree, dict) else None
    if not isinstance(laws, dict) or len(laws) != 1:
        raise ConfigError(
            f"{path} does not contain one law; `moefit law fit --save` writes such a file"
        )
    ((name, fields),) = laws.items()
    try:
        return Law.model_validate({"name": str(name), **fields})
    except (ValidationError, TypeError) as error:
        raise ConfigError(f"{path} is not a valid law: {in_brief(error, 400)}") from error


def law_yaml(law: Law) -> dict[str, Any]:
    """Return a law as the content of a file that `find_law` reads."""
    fields = law.model_dump(mode="json", exclude={"name"}, exclude_none=True)
    fields["ranges"] = {name: list(ends) for name, ends in law.ranges.items()}
    return {"laws": {law.name: fields}}
