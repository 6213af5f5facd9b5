"""Request fields about tools: definitions, the choice among them, and calls in a conversation."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

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


def _given(text: str) -> str:
    return text or "{}"


class CalledFunction(StrictModel):
    """A function with the arguments that the model wrote, which may be cut or no JSON.

    So may its name, which need not be that of a tool. `parsed_arguments` is what OpenAI's client
    adds to an answer; it is ignored.
    """

    name: str
    arguments: Annotated[str, AfterValidator(_given)]
    parsed_arguments: Any = Field(default=None, exclude=True)


class ToolCall(StrictModel):
    """A call in an assistant's message."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


Tools = Annotated[Items[Tool], Field(max_length=MAX_TOOLS)]
ToolCalls = Annotated[Items[ToolCall], Field(max_length=MAX_TOOLS)]
