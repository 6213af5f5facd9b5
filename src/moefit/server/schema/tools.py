"""Request fields about tools: definitions, the choice among them, and calls in a conversation."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from moefit.server.schema.base import Items, StrictModel

MAX_TOOLS = 128
# Names go into prompts, grammars and pages, so they have no markup.
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(StrictModel):
    """A function that the model may call."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    """A tool; functions are the only kind."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(StrictModel):
    """The name of a function."""

    name: ToolName


class NamedTool(StrictModel):
    """The tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def _object_text(text: str) -> str:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise PydanticCustomError("arguments", "arguments must be the text of a JSON object")
    return text or "{}"


class CalledFunction(StrictModel):
    """A function with the arguments that the model wrote."""

    name: ToolName
    arguments: Annotated[str, AfterValidator(_object_text)]


class ToolCall(StrictModel):
    """A call in an assistant's message."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


Tools = Annotated[Items[Tool], Field(max_length=MAX_TOOLS)]
ToolCalls = Annotated[Items[ToolCall], Field(max_length=MAX_TOOLS)]
