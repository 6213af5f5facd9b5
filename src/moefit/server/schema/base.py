"""Base of request bodies: strict models that reject or report what they do not know."""

from collections.abc import Mapping
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

T = TypeVar("T")
_MAX_REPORTED = 8  # unknown fields per object

Items = Annotated[list[T], Field(fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Unsupported = Annotated[Items[str], Field(max_length=0)]


class StrictModel(BaseModel):
    """Base of request models: unknown fields and numbers in quotes are errors; null means absent.

    NEUTRAL maps unsupported fields to the values that request no change of behaviour.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    NEUTRAL: ClassVar[Mapping[str, Any]] = {}

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, given: Any) -> Any:
        """Remove unknown fields without effect, and all but a few of the others."""
        if not isinstance(given, dict) or given.keys() <= cls.model_fields.keys():
            return given
        known = {name: given[name] for name in cls.model_fields if name in given}
        unknown = (
            name for name in given if name not in known and not cls._asks_nothing(given, name)
        )
        return known | {name: given[name] for name in islice(unknown, _MAX_REPORTED)}

    @classmethod
    def _asks_nothing(cls, given: Mapping[str, Any], name: str) -> bool:
        """Return whether an unknown field is null or neutral; 1 equals 1.0 but not true."""
        value, neutral = given[name], cls.NEUTRAL.get(name)
        alike = isinstance(value, bool) == isinstance(neutral, bool)
        return value is None or (neutral is not None and alike and value == neutral)
