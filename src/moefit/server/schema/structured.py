"""Request fields that restrict the form of an answer: OpenAI's `response_format`, and vLLM's."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from moefit.server.schema.base import Items, StrictModel


class TextFormat(StrictModel):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(StrictModel):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(StrictModel):
    """A named JSON schema. It is enforced whether or not `strict` is true."""

    name: Annotated[str, Field(max_length=256)] = "answer"
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaFormat(StrictModel):
    """JSON that a schema admits."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


_FORMATS = ("text", "json_object", "json_schema")


def _known_format(given: Any) -> Any:
    kind = given.get("type") if isinstance(given, dict) else None
    if isinstance(kind, str) and kind not in _FORMATS:
        raise PydanticCustomError(
            "format",
            "'{kind}' is not supported; use text, json_object or json_schema",
            {"kind": kind[:40], "within": ("type",)},
        )
    return given


def _kind_of_format(given: Any) -> str:
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return f"<{kind}>" if kind in _FORMATS else "<text>"


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonObjectFormat, Tag("<json_object>")]
    | Annotated[JsonSchemaFormat, Tag("<json_schema>")],
    Discriminator(_kind_of_format),
    BeforeValidator(_known_format),
]


class StructuredOutputs(StrictModel):
    """vLLM's structured outputs: exactly one of the first five."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[Items[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
