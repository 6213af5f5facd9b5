"""What the soak test asks a server, and what the answers must be.

A script is a list of requests that one client sends one after the other. Greedy answers are
compared with those of the model itself, all others (sampled with a seed, structured, tools) with
those of a server that computes nothing else, without kept prefixes and without drafts.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jsonschema

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES = "/v1/responses"
TEMPLATE = (
    "{%- if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}<assistant>{# <tool_call> #}"
)
"""For the copy of the model, which has no chat template; the comment names the form of calls."""
PROMPTS = (
    "def main():", "class Reader(", "import os\n", "    return self.", "for name in", "# The",
    'raise ValueError("', "    def __init__(self", "if __name__ ==", "try:\n    import",
    "@property\n", "from collections import",
)  # fmt: skip
PREAMBLE = '''"""Reads and writes records of a store."""

import json
import os
from pathlib import Path


class Store:
    """Records in a folder, a file for each."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def read(self, name):
        path = self.folder / name
        if not path.exists():
            raise KeyError(name)
        return json.loads(path.read_text())

    def write(self, name, record):
        path = self.folder / name
        path.write_text(json.dumps(record))
        return path
'''
OPENINGS = ("    def remove", "    def names", "\n\ndef main", "    @property")
SEEDS = range(2)
TURNS = (
    "\n    def copy(self, name, other):\n        ", "\n\n    # Sizes of files\n    def size(self",
    "\n\nif __name__ == '__main__':\n", "\n\ndef test_read():\n    store = Store(",
)  # fmt: skip
EDITED = "    def value_{n}(self):\n        return self.values[{n}]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request.

    Attributes:
        kind: Name for counts.
        url: Path.
        body: Its JSON, without `stream`.
        expected: The answer as `answer_of` returns it; None: an error that blames the request.
        schemas: What JSON in the answer must match: by the name of a tool, or "" for its text.
    """

    kind: str
    url: str
    body: Mapping[str, Any]
    expected: str | None = ""
    schemas: Mapping[str, Any] = field(default_factory=dict)


Script = Sequence[Ask]


def greedy_scripts(own: Callable[[str, int], str]) -> list[Script]:
    """Return scripts of greedy completions.

    Args:
        own: Returns the model's own greedy continuation of a prompt, of so many tokens at most.
    """

    def ask(kind: str, prompt: str, tokens: int) -> Ask:
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
        expected = json.dumps([own(prompt, tokens)])
        return Ask(kind=kind, url=COMPLETIONS, body=body, expected=expected)

    def conversation(opening: str) -> Script:
        text, asks = PREAMBLE + opening, []
        for turn in (*TURNS, ""):
            asks.append(ask("conversation", text, 24))
            text += json.loads(asks[-1].expected or "")[0] + turn
        return asks

    edits = ["class Values:\n" + "".join(EDITED.format(n=n + k) for n in range(6)) for k in (1, 4)]
    return [
        *([ask("plain", prompt, tokens)] for prompt in PROMPTS for tokens in (4, 32)),
        *map(conversation, OPENINGS),
        *([ask("repetition", text, 64)] for text in edits),
        *([ask("long", PREAMBLE * 6 + opening, 32)] for opening in OPENINGS),
    ]


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
EDIT = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "pattern": "^[a-z]{1,8}\\.py$"},
        "line": {"type": "integer", "minimum": 1, "maximum": 9999},
        "whole": {"type": "boolean"},
    },
    "required": ["path", "line", "whole"],
    "additionalProperties": False,
}
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}, "on": {"type": "string", "format": "date"}},
    "required": ["city", "on"],
    "additionalProperties": False,
}
TOOLS = {"edit": EDIT, "weather": CITY}
SAYS = ("Change the file.", "How is the weather?", "Who wrote this store?")


def other_scripts() -> list[Script]:
    """Return scripts whose answers a server has to give first."""
    return [
        *([one] for seed in SEEDS for one in _structured(seed)),
        *([one] for seed in SEEDS for one in _tools(seed)),
        *([one] for seed in SEEDS for one in _sampled(seed)),
    ]


def _structured(seed: int) -> Iterator[Ask]:
    sampled = {"max_tokens": 300, "seed": seed, "temperature": 0.9}
    format_ = {"type": "json_schema", "json_schema": {"name": "it", "schema": PERSON}}
    for url, asked in ((COMPLETIONS, {"prompt": PREAMBLE}), (CHAT, {"messages": _says(seed)})):
        body = {**sampled, **asked, "response_format": format_}
        yield Ask(kind="schema", url=url, body=body, schemas={"": PERSON})
    pattern = "[a-f]{4,8}(-[0-9]{2}){1,3}"
    body = {**sampled, "prompt": "id = ", "structured_outputs": {"regex": pattern}}
    text = {"type": "string", "pattern": f"^{pattern}$"}
    yield Ask(kind="regex", url=COMPLETIONS, body=body, schemas={"text": text})


def _tools(seed: int) -> Iterator[Ask]:
    sampled = {"seed": seed, "temperature": 0.9, "parallel_tool_calls": False}
    tools = [{"name": name, "parameters": schema} for name, schema in TOOLS.items()]
    chat = [{"type": "function", "function": one} for one in tools]
    named = {"type": "function", "function": {"name": "edit"}}
    for choice in ("required", named):
        body = {"messages": _says(seed), "tools": chat, "tool_choice": choice, "max_tokens": 300}
        yield Ask(kind="tools", url=CHAT, body={**sampled, **body}, schemas=TOOLS)
    body = {
        "input": SAYS[seed], "tools": [{"type": "function", **one} for one in tools],
        "tool_choice": "required", "max_output_tokens": 300,
    }  # fmt: skip
    yield Ask(kind="responses", url=RESPONSES, body={**sampled, **body}, schemas=TOOLS)


def _sampled(seed: int) -> Iterator[Ask]:
    for more in ({"n": 2, "top_p": 0.9}, {"frequency_penalty": 0.5, "top_k": 40}):
        body = {"prompt": PREAMBLE + OPENINGS[seed], "max_tokens": 32, "seed": seed, **more}
        yield Ask(kind="sampled", url=COMPLETIONS, body=body)


def _says(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": SAYS[number]}]


def bomb(number: int) -> Ask:
    """Return a request that must be refused; each number is a new one for the server."""
    schemas = (
        {"type": "integer", "multipleOf": 9973, "minimum": 1, "maximum": 10**15 + number},
        {"type": "string", "pattern": f"(a{{1000}}){{1000}}{number}"},
        {"allOf": [{"anyOf": [{"properties": {f"{n}": {}, f"{k}-{number}": {}}} for k in (1, 2)]}
                   for n in range(3, 30)]},
    )  # fmt: skip
    body = {"prompt": "x", "max_tokens": 4, "guided_json": schemas[number % len(schemas)]}
    return Ask(kind="bomb", url=COMPLETIONS, body=body, expected=None)


def salted(script: Script, salt: str | None) -> Script:
    """Return a script that shares kept prefixes only with those of the same salt."""
    if salt is None:
        return script
    return [replace(one, body={**one.body, "cache_salt": salt}) for one in script]


def answer_of(url: str, response: Mapping[str, Any]) -> str:
    """Return what a response says, in a form that does not depend on ids and times."""
    if url == COMPLETIONS:
        return json.dumps([choice["text"] for choice in response["choices"]])
    if url == CHAT:
        messages = [choice["message"] for choice in response["choices"]]
        return json.dumps([[one["content"] or "", _calls(one)] for one in messages])
    said = ("".join(part["text"] for part in one.get("content", [])) for one in response["output"])
    calls = [[o["name"], o["arguments"]] for o in response["output"] if "arguments" in o]
    return json.dumps([["".join(said), calls]])


def _calls(message: Mapping[str, Any]) -> list[list[str]]:
    made = message.get("tool_calls") or []
    return [[one["function"]["name"], one["function"]["arguments"]] for one in made]


class Assembled:
    """The response that the events of a stream add up to."""

    def __init__(self, url: str):
        self._url, self._choices, self._last = url, {}, {}

    def add(self, event: Mapping[str, Any]) -> None:
        """Add an event."""
        if self._url == RESPONSES:
            self._last = event.get("response", self._last)
            return
        for choice in event["choices"]:
            known = self._choices.setdefault(
                choice["index"], {"text": "", "message": {"content": "", "tool_calls": []}}
            )
            known["text"] += choice.get("text", "")
            delta, message = choice.get("delta", {}), known["message"]
            message["content"] += delta.get("content") or ""
            for call in delta.get("tool_calls") or []:
                calls, function = message["tool_calls"], call["function"]
                if call["index"] == len(calls):
                    calls.append({"function": {"name": function["name"], "arguments": ""}})
                calls[call["index"]]["function"]["arguments"] += function["arguments"]

    def answer(self) -> str:
        """Return the answer, as `answer_of` does."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        return answer_of(self._url, {"choices": choices, **self._last})


def is_valid(ask: Ask, answer: str) -> bool:
    """Return whether the JSON in an answer matches its schemas."""
    try:
        for said in json.loads(answer):
            text, calls = said if isinstance(said, list) else (said, [])
            if "" in ask.schemas:
                jsonschema.validate(json.loads(text), ask.schemas[""])
            if "text" in ask.schemas:
                jsonschema.validate(text, ask.schemas["text"])
            if ask.kind in ("tools", "responses"):
                assert calls, "no call"
            for name, arguments in calls:
                jsonschema.validate(json.loads(arguments), ask.schemas[name])
    except (ValueError, AssertionError, KeyError, jsonschema.ValidationError):
        return False
    return True
