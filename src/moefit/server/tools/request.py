"""Tools of a request: what the template is given, what an answer may be, and how it is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moefit.engine.structured.grammar import Grammar, GrammarCompiler
from moefit.server.errors import APIError
from moefit.server.schema.tools import NamedTool, Tool, ToolChoice
from moefit.server.structured.request import Form, compiled
from moefit.server.tools.dialect import AnswerParser, Dialect
from moefit.server.tools.grammar import ToolForm, Wanted, write_grammar

_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """Tools that a request may call.

    Attributes:
        tools: Their definitions, in the request's order; none if calls are not allowed.
        required: Whether one must be called.
        only: Name of the only tool that may be called; None for any.
        many: Whether several calls may follow each other.
    """

    tools: Sequence[Tool] = ()
    required: bool = False
    only: str | None = None
    many: bool = True

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]] | None:
        """Schemas of arguments by tool; None without tools."""
        found = {one.function.name: one.function.parameters or _NO_ARGUMENTS for one in self.tools}
        return found or None

    def for_template(self) -> list[dict[str, Any]] | None:
        """Return the definitions as chat templates expect them; None without tools."""
        return [_definition(one) for one in self.tools] or None

    def forms(self) -> list[ToolForm]:
        """Return the tools that may be called, for a grammar."""
        return [
            ToolForm(
                name=one.function.name,
                schema=one.function.parameters or _NO_ARGUMENTS,
                strict=self.required or bool(one.function.strict),
                field=f"tools[{number}].function.parameters",
            )
            for number, one in enumerate(self.tools)
            if self.only in (None, one.function.name)
        ]


def _definition(tool: Tool) -> dict[str, Any]:
    function = tool.function.model_dump(include={"name", "description"}, exclude_none=True)
    parameters = tool.function.parameters or dict(_NO_ARGUMENTS)
    return {"type": "function", "function": {**function, "parameters": parameters}}


def tool_use(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None, dialect: Dialect
) -> ToolUse:
    """Return which tools a request may call.

    Args:
        tools: Definitions in the request.
        choice: `tool_choice` of the request.
        parallel: `parallel_tool_calls` of the request.
        dialect: Of the model.

    Raises:
        APIError: If the choice contradicts the tools, or the model has no known form of calls.
    """
    names = [one.function.name for one in tools or ()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise APIError(400, f"two tools are named {twice!r}; rename one", param="tools")
    named = choice.function.name if isinstance(choice, NamedTool) else None
    if named is not None and named not in names:
        raise APIError(
            400, f"tool_choice names {named!r}, which is not among the tools", param="tool_choice"
        )
    if not tools:
        if choice == "required":
            raise APIError(400, "tool_choice required needs tools", param="tool_choice")
        return ToolUse()
    if choice == "none":
        return ToolUse()
    if dialect.style is None:
        raise APIError(
            400,
            "this model's chat template has no known form of tool calls; omit tools, or start the "
            "server with --tool-parser and the name of a form",
            param="tools",
            code="unsupported_by_model",
        )
    required = named is not None or choice == "required"
    return ToolUse(tools=tools, required=required, only=named, many=parallel is not False)


def answer_grammar(
    grammars: GrammarCompiler, dialect: Dialect, use: ToolUse, form: Form | None, prompt: str
) -> Grammar | None:
    """Return the grammar of an answer; None if it may be any text.

    Args:
        grammars: Compiles it.
        dialect: Of the model.
        use: Tools that may be called.
        form: Form of an answer without calls.
        prompt: The rendered conversation, which may end within the reasoning.

    Raises:
        APIError: If a schema is not supported, naming its field.
        ConfigError: If the server cannot compile grammars.
    """
    tools = use.forms()
    single = dialect.channels  # a call ends the answer there
    wanted = Wanted(tools=tools, required=use.required, many=use.many or single, form=form)
    if not wanted.restricts:
        return None
    style, thought = dialect.style, dialect.thought(prompt)
    start, forms = write_grammar(wanted, style, dialect.thinking, dialect.ids, thought=thought)
    return compiled(grammars, start, forms)


def answer_parser(dialect: Dialect, use: ToolUse, prompt: str) -> AnswerParser:
    """Return the parser of an answer."""
    return dialect.parser(prompt, use.schemas)
