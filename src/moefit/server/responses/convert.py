"""Convert requests of the Responses API to chat completions."""

import json
from collections.abc import Sequence
from typing import Any

from moefit.server.openai_schema import ChatCompletionRequest
from moefit.server.schema.responses import (
    CallItem,
    FunctionChoice,
    InputText,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
    SchemaFormat,
)

_SAME = (
    "model", "temperature", "top_p", "seed", "parallel_tool_calls", "stream", "cache_salt",
    "chat_template_kwargs",
)  # fmt: skip


def chat_request(body: ResponsesRequest) -> ChatCompletionRequest:
    """Return the chat completion request that a request stands for.

    Raises:
        ValidationError: From pydantic, if an item is invalid.
    """
    given: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    given["messages"] = _messages(body)
    given["max_completion_tokens"] = body.max_output_tokens
    given["reasoning_effort"] = body.reasoning and body.reasoning.effort
    given["stream_options"] = {"include_usage": True} if body.stream else None
    if body.tools is not None:
        given["tools"] = [
            {"type": "function", "function": one.model_dump(exclude={"type"})} for one in body.tools
        ]
    given["tool_choice"] = body.tool_choice
    if isinstance(body.tool_choice, FunctionChoice):
        given["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    form = body.text and body.text.format
    if isinstance(form, SchemaFormat):
        schema = form.model_dump(by_alias=True, exclude={"type"})
        given["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif form is not None:
        given["response_format"] = form.model_dump()
    return ChatCompletionRequest.model_validate(given)


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    thoughts: str | None = None
    for item in body.input:
        if isinstance(item, ReasoningItem):
            thoughts = "".join(part.text for part in item.content or item.summary)
            continue
        if isinstance(item, MessageItem):
            messages.append({"role": item.role, "content": _text(item.content)})
        elif isinstance(item, CallItem):
            _add_call(messages, item)
        else:
            answer = {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
            messages.append(answer)
        if thoughts and messages[-1]["role"] == "assistant":
            messages[-1]["reasoning_content"] = thoughts
        thoughts = None
    return messages


def _add_call(messages: list[dict[str, Any]], item: CallItem) -> None:
    """Add a call to the assistant's message before it, or to a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    messages[-1].setdefault("tool_calls", []).append(call)


def _text(content: str | Sequence[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def shown(body: ResponsesRequest) -> dict[str, Any]:
    """Return the request's settings as responses repeat them."""
    given = json.loads(body.model_dump_json(by_alias=True))
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": given["reasoning"] or {"effort": None, "summary": None},
        "temperature": body.temperature,
        "text": {"format": (given["text"] or {}).get("format") or {"type": "text"}},
        "tool_choice": given["tool_choice"] or "auto",
        "tools": given["tools"] or [],
        "top_p": body.top_p,
    }
