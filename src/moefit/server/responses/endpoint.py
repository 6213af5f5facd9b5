"""POST /v1/responses: chat completions in the form of OpenAI's Responses API.

Nothing is stored: each request has its whole conversation. A stream's events are written from the
chunks of the chat completion.
"""

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError

from moefit.server.chat import ChatBuilder
from moefit.server.openai_schema import ChatMessage, Delta, Finish, Usage
from moefit.server.responses.convert import chat_request, shown
from moefit.server.schema.responses import ResponsesRequest
from moefit.server.service import EngineRequest, Service, new_id
from moefit.server.streaming import STREAM, EngineEvents, StreamEvent, respond


class ResponseObject(BaseModel):
    """A response; settings of the request are repeated in further fields."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: str = "response"
    created_at: int
    status: str
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    error: None = None
    incomplete_details: dict[str, str] | None = None


class _Output:
    """Output items of one response: reasoning, a message and calls, in the order of the answer."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []

    def kind_of_last(self) -> str:
        """Return the kind of the last item; empty if there is none."""
        return self.items[-1]["type"] if self.items else ""

    def begin(self, kind: str, **more: Any) -> dict[str, Any]:
        """Add an item without content."""
        prefix = {"message": "msg", "function_call": "fc", "reasoning": "rs"}[kind]
        item = {"id": new_id(prefix), "type": kind, "status": "in_progress", **more}
        self.items.append(item)
        return item


def _message_item(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {"role": "assistant", "content": [part]}


def _items(message: ChatMessage, *, cut: bool) -> list[dict[str, Any]]:
    """Return the output items of a whole message; the last one may be cut."""
    output = _Output()
    if message.reasoning_content:
        part = {"type": "reasoning_text", "text": message.reasoning_content}
        output.begin("reasoning", summary=[], content=[part])
    if message.content or not (message.reasoning_content or message.tool_calls):
        output.begin("message", **_message_item(message.content or ""))
    for call in message.tool_calls or ():
        name, arguments = call.function.name, call.function.arguments
        output.begin("function_call", call_id=call.id, name=name, arguments=arguments)
    for item in output.items:
        item["status"] = "completed"
    output.items[-1]["status"] = _status_of_last(cut=cut)
    return output.items


def _status_of_last(*, cut: bool) -> str:
    return "incomplete" if cut else "completed"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }


class ResponseWriter:
    """Builds engine requests and responses for one request to /v1/responses."""

    def __init__(self, service: Service, body: ResponsesRequest, chat: ChatBuilder):
        self._service, self._body, self._chat = service, body, chat
        self._id, self._created = new_id("resp"), service.now()
        self._output, self._number = _Output(), 0

    def check(self) -> None:
        """Raise APIError if the request is not supported."""
        self._chat.check()

    def engine_requests(self) -> list[EngineRequest]:
        """Return the engine request; may be slow."""
        return self._chat.engine_requests()

    async def full_response(self, engine_events: EngineEvents) -> ResponseObject:
        """Return the complete response."""
        answer = await self._chat.full_response(engine_events)
        (choice,) = answer.choices
        items = _items(choice.message, cut=choice.finish_reason == "length")
        return self._response(items, choice.finish_reason, answer.usage)

    async def chunks(self, engine_events: EngineEvents) -> AsyncIterator[StreamEvent]:
        """Yield the events of a stream."""
        finish: Finish | None = None
        usage: Usage | None = None
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response([]).model_dump())
        async for chunk in self._chat.chunks(engine_events):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                finish = choice.finish_reason or finish
                for event in self._delta(choice.delta):
                    yield event
        if not self._output.items:
            for event in self._began("message", **_message_item("")):
                yield event
        for event in self._ended(cut=finish == "length"):
            yield event
        done = self._response(self._output.items, finish, usage)
        yield self._event(f"response.{done.status}", response=done.model_dump())

    def _delta(self, delta: Delta) -> list[StreamEvent]:
        if delta.reasoning_content:
            more: dict[str, Any] = {
                "summary": [],
                "content": [{"type": "reasoning_text", "text": ""}],
            }
            return self._text("reasoning", "reasoning_text", delta.reasoning_content, more)
        if delta.content:
            return self._text("message", "output_text", delta.content, _message_item(""))
        events: list[StreamEvent] = []
        for call in delta.tool_calls or ():
            if call.function.name is not None:
                more = {"call_id": call.id, "name": call.function.name, "arguments": ""}
                events += self._ended() + self._began("function_call", **more)
            if text := call.function.arguments:
                self._output.items[-1]["arguments"] += text
                events.append(self._item_event("function_call_arguments.delta", delta=text))
        return events

    def _text(self, kind: str, part: str, text: str, more: dict[str, Any]) -> list[StreamEvent]:
        events: list[StreamEvent] = []
        if self._output.kind_of_last() != kind:
            events += self._ended() + self._began(kind, **more)
        self._output.items[-1]["content"][0]["text"] += text
        return [*events, self._item_event(f"{part}.delta", content_index=0, delta=text)]

    def _began(self, kind: str, **more: Any) -> list[StreamEvent]:
        item = self._output.begin(kind, **more)
        empty = {**item, "content": []} if "content" in item else {**item}
        events = [self._event("response.output_item.added", output_index=self._index, item=empty)]
        if "content" in item:
            part = {**item["content"][0]}
            events.append(self._item_event("content_part.added", content_index=0, part=part))
        return events

    def _ended(self, *, cut: bool = False) -> list[StreamEvent]:
        """Return the events that end the last item, if it has not ended; it may be cut."""
        if not self._output.items or self._output.items[-1]["status"] != "in_progress":
            return []
        item = self._output.items[-1]
        item["status"] = _status_of_last(cut=cut)
        events: list[StreamEvent] = []
        if item["type"] == "function_call":
            whole = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._item_event("function_call_arguments.done", **whole))
        else:
            part = item["content"][0]
            whole = {"content_index": 0, "text": part["text"]}
            events.append(self._item_event(f"{part['type']}.done", **whole))
            done = {"content_index": 0, "part": part}
            events.append(self._item_event("content_part.done", **done))
        index = self._index
        return [*events, self._event("response.output_item.done", output_index=index, item=item)]

    @property
    def _index(self) -> int:
        return len(self._output.items) - 1

    def _item_event(self, kind: str, **more: Any) -> StreamEvent:
        item_id = self._output.items[-1]["id"]
        return self._event(f"response.{kind}", item_id=item_id, output_index=self._index, **more)

    def _event(self, kind: str, **more: Any) -> StreamEvent:
        self._number += 1
        return StreamEvent(type=kind, sequence_number=self._number - 1, **more)

    def _response(
        self,
        items: list[dict[str, Any]],
        finish: Finish | None = None,
        usage: Usage | None = None,
    ) -> ResponseObject:
        status = "in_progress" if finish is None else "completed"
        cut = finish == "length"
        return ResponseObject(
            id=self._id,
            created_at=self._created,
            status="incomplete" if cut else status,
            model=self._service.settings.name,
            output=items,
            usage=None if usage is None else _usage(usage),
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            **shown(self._body),
        )


def router(service: Service) -> APIRouter:
    """Return the router with POST /v1/responses."""
    routes = APIRouter()
    responses: dict[int | str, dict[str, Any]] = {
        200: {"model": ResponseObject, "content": {STREAM: {}}}
    }

    @routes.post("/v1/responses", responses=responses, response_model=None)
    async def create(body: Annotated[ResponsesRequest, Body()], request: Request) -> Response:
        """Generate a response to a whole conversation; nothing is stored."""
        try:
            chat = chat_request(body)
        except ValidationError as error:
            errors = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
            raise RequestValidationError(errors, body={}) from error
        writer = ResponseWriter(service, body, ChatBuilder(service, chat))
        return await respond(service, writer, request, chat)

    return routes
