"""Body of POST /v1/responses: OpenAI's Responses API without stored conversations."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from moefit.server.schema.base import Items, ReasoningEffort, StrictModel
from moefit.server.schema.structured import JsonObjectFormat, TextFormat
from moefit.server.schema.tools import ToolName


class InputText(StrictModel):
    """A text part of an item."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str
    annotations: Annotated[Items[Any], Field(max_length=64)] | None = None
    logprobs: Any = None


Texts = str | Annotated[Items[InputText], Field(min_length=1)]


class MessageItem(StrictModel):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Texts
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class CallItem(StrictModel):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(max_length=256)]
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class OutputItem(StrictModel):
    """What a called function returned."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(max_length=256)]
    output: Texts
    id: str | None = None
    status: str | None = None


class ReasoningItem(StrictModel):
    """Reasoning of an earlier response."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: Annotated[Items[InputText], Field(max_length=64)] = Field(default_factory=list)
    content: Annotated[Items[InputText], Field(max_length=64)] | None = None
    encrypted_content: None = None
    status: str | None = None


_KINDS = ("message", "function_call", "function_call_output", "reasoning")


def _kind_of_item(given: Any) -> str:
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return f"<{kind}>" if kind in _KINDS else "<message>"


Item = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[OutputItem, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(_kind_of_item),
]


class FunctionTool(StrictModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(StrictModel):
    """The function that must be called."""

    type: Literal["function"]
    name: ToolName


class SchemaFormat(StrictModel):
    """JSON that a schema admits."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(max_length=256)] = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


def _kind_of_format(given: Any) -> str:
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return f"<{kind}>" if kind in ("json_object", "json_schema") else "<text>"


class TextSettings(StrictModel):
    """Form of the answer."""

    format: (
        Annotated[
            Annotated[TextFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[SchemaFormat, Tag("<json_schema>")],
            Discriminator(_kind_of_format),
        ]
        | None
    ) = None
    verbosity: None = None


class Reasoning(StrictModel):
    """How much to reason. Reasoning is returned as it is, so a summary has no effect."""

    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


Included = Literal["reasoning.encrypted_content"]
"""What may be included and has no effect: reasoning is not encrypted, but part of the answer."""


class ResponsesRequest(StrictModel):
    """POST /v1/responses. `store`, `metadata`, `user` and the like have no effect."""

    model: str | None = None
    input: str | Annotated[Items[Item], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    tools: Annotated[Items[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    stream: bool | None = None
    previous_response_id: None = None
    conversation: None = None
    background: Literal[False] | None = None
    truncation: Literal["disabled"] | None = None
    reasoning: Reasoning | None = None
    include: Annotated[Items[Included], Field(max_length=8)] | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
