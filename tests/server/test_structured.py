"""Structured output over HTTP, with the shipped model: its answers match what was asked for."""

import json
import re
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import jsonschema
import pytest
import torch
from engines import running
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from serving_http import client_of, error_of, events

from moefit.engine.api import SamplingParams
from moefit.engine.sampler import Sampler, sample
from moefit.engine.structured.grammar import GrammarCompiler
from moefit.engine.structured.sources import json_part, whole
from moefit.errors import ConfigError
from moefit.serve.model import ServedModel
from moefit.server.middleware import ServerSettings
from moefit.server.service import Service

URL, CHAT = "/v1/completions", "/v1/chat/completions"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
ASKED = {"prompt": "def main():", "max_tokens": 200, "seed": 5}


@pytest.fixture(scope="module")
def client(served: ServedModel) -> Iterator[TestClient]:
    served.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    with running(served, max_model_len=400) as engine:
        service = Service(engine, ServerSettings(name="reference"))
        with client_of(service) as one:
            yield one
        service.close()
    served.tokenizer.chat_template = None


def post(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    response = client.post(URL, json={**ASKED, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"]


@pytest.mark.parametrize(
    "how",
    [
        {"response_format": {"type": "json_schema",
                             "json_schema": {"name": "p", "strict": True, "schema": PERSON}}},
        {"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}},
        {"guided_json": json.dumps(PERSON)},
    ],
)  # fmt: skip
def test_answers_match_the_schema(client, how) -> None:
    for choice in post(client, **how, n=2):
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["text"]), PERSON)
        if "structured_outputs" in how:
            assert re.fullmatch(r'\{"name":".*","age":\d+,"kind":"[ab]"\}', choice["text"])


def test_json_object(client) -> None:
    (choice,) = post(client, response_format={"type": "json_object"})
    assert isinstance(json.loads(choice["text"]), dict)


def test_regex_choice_and_grammar(client) -> None:
    for choice in post(client, guided_regex="[a-z]{3}/[0-9]{2,4}", n=2):
        assert re.fullmatch("[a-z]{3}/[0-9]{2,4}", choice["text"])
    texts = ["yes", 'né"e', "no"]
    for choice in post(client, structured_outputs={"choice": texts}, n=4):
        assert choice["text"] in texts
    for choice in post(client, guided_choice=(many := [f"word{n}" for n in range(5000)]), n=2):
        assert choice["text"] in many
    for grammar in ('start: "a" start | "b"', 'root ::= "a" root | "b"'):
        (choice,) = post(client, guided_grammar=grammar, max_tokens=300)
        assert re.fullmatch("a*b", choice["text"])


def test_stop_texts_and_lengths_end_answers(client) -> None:
    (choice,) = post(client, guided_choice=["one, two", "six, ten"], stop=[","])
    assert choice["text"] in ("one", "six") and choice["finish_reason"] == "stop"
    (choice,) = post(client, guided_regex="[a-z]{50}", max_tokens=3)
    assert re.fullmatch("[a-z]+", choice["text"]) and choice["finish_reason"] == "length"
    (choice,) = post(client, guided_regex="a{2}", ignore_eos=True)
    assert (choice["text"], choice["finish_reason"]) == ("aa", "stop")


def test_log_probabilities_are_the_models(client) -> None:
    """They are those before the mask, so the chosen token may have a tiny one."""
    (choice,) = post(client, guided_choice=["zzz"], logprobs=2)
    told = choice["logprobs"]
    assert "".join(told["tokens"]) == "zzz" and len(told["top_logprobs"][0]) >= 2
    assert told["token_logprobs"][0] < max(told["top_logprobs"][0].values())


def test_seeds_repeat_answers_and_differ_by_choice(client) -> None:
    first = [one["text"] for one in post(client, guided_json=PERSON, n=3)]
    assert first == [one["text"] for one in post(client, guided_json=PERSON, n=3)]
    assert len(set(first)) > 1


def test_streams_add_up(client) -> None:
    (whole_one,) = post(client, guided_json=PERSON)
    frames = events(client.post(URL, json={**ASKED, "guided_json": PERSON, "stream": True}))
    assert "".join(f["choices"][0]["text"] for f in frames) == whole_one["text"]


def test_chat(client) -> None:
    asked = {
        "messages": [{"role": "user", "content": "who?"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}},
    }
    (choice,) = client.post(CHAT, json={**asked, "max_tokens": 200}).json()["choices"]
    jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)


def test_other_requests_keep_their_bits(served: ServedModel) -> None:
    """Rows without a grammar are chosen as if the masked rows were not there."""
    size = served.model.config.vocab_size
    compiler = GrammarCompiler(served.tokenizer, size=size, eos_ids={0})
    grammar = compiler.compile(whole(json_part(PERSON, "it")))
    logits_NV = torch.randn(6, size, generator=torch.Generator().manual_seed(0))
    before = logits_NV.clone()

    def samplers(masked: bool) -> list[Sampler]:
        return [
            Sampler(
                SamplingParams(
                    max_tokens=1, seed=n, temperature=float(n % 3), logprobs=n % 2 or None,
                    grammar=grammar if masked and n in (0, 3, 4) else None,
                )
            )
            for n in range(6)
        ]  # fmt: skip

    with_masks, without = sample(logits_NV, samplers(True)), sample(logits_NV, samplers(False))
    assert torch.equal(logits_NV, before)
    assert [with_masks[n] for n in (1, 2, 5)] == [without[n] for n in (1, 2, 5)]
    assert all(with_masks[n] != without[n] for n in (0, 3, 4))


@pytest.mark.parametrize(
    ("asked", "param", "words"),
    [
        ({"guided_json": {"uniqueItems": True}}, "guided_json", "uses uniqueItems"),
        ({"guided_json": "{"}, "guided_json", "is not JSON"),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_regex": "((a{999}){999}){999}"}, "guided_regex", "10,000"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "unknown name"),
        ({"guided_grammar": ""}, "guided_grammar", "has no rules"),
        ({"guided_grammar": "only words"}, "guided_grammar", "has no rules"),
        ({"guided_regex": "a\ud800"}, "guided_regex", "surrogate at character 1"),
        ({"guided_json": {"const": "\ud800"}}, "guided_json", ""),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice", "both restrict"),
        ({"structured_outputs": {}}, "structured_outputs", "restricts nothing"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", ""),
        ({"response_format": {"type": "xml"}}, "response_format.type", "use text, json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (
            {"response_format": {"type": "json_schema",
                                 "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format.json_schema.schema", "uses not",
        ),
    ],
)  # fmt: skip
def test_invalid_forms_are_named(client, asked, param: str, words: str) -> None:
    body = json.dumps({**ASKED, **asked})  # in ASCII, so that it may have a lone surrogate
    headers = {"content-type": "application/json"}
    error = error_of(client.post(URL, content=body, headers=headers), 400)
    assert error["param"] == param and words in error["message"]


BOMBS: list[Any] = [
    {"type": "integer", "multipleOf": 9973, "minimum": 1, "maximum": 10**15},
    {"allOf": [{"anyOf": [{"properties": {f"{n}": {}, f"{k}": {}}} for k in (1, 2)]}
               for n in range(3, 30)]},
    {"$defs": {f"d{n}": {"properties": {"x": {"$ref": f"#/$defs/d{n + 1}"},
                                        "y": {"$ref": f"#/$defs/d{n + 1}"}}} for n in range(400)},
     "$ref": "#/$defs/d0"},
    {"type": "string", "minLength": 10**8, "maxLength": 10**9},
    {"type": "array", "minItems": 10**6, "maxItems": 10**9},
    {"type": "object", "properties": {f"p{n}": {} for n in range(3000)}},
    {"properties": {f"p{n}": {"pattern": "(a|b)*a(a|b){300}"} for n in range(200)}},
]  # fmt: skip


def test_schema_bombs_stop_nobody(client) -> None:
    """Each ends in seconds, with an answer or an error, while other requests go on."""
    for bomb in BOMBS:
        began = perf_counter()
        response = client.post(URL, json={**ASKED, "max_tokens": 4, "guided_json": bomb})
        assert response.status_code in (200, 400), response.text
        assert perf_counter() - began < 20
    assert post(client, max_tokens=2)[0]["finish_reason"] == "length"


REGEX_BOMBS = [
    "((a{1000}){1000}){1000}", "(a|b)*a(a|b){300}", "(a+)+$", "(((a|b|ab)*)*)*c", r"\p{L}{1,9999}",
    "(" * 2000 + "a" + ")" * 2000, "|".join(f"a{n}b*" for n in range(5000)), "(?=a)" * 500,
]  # fmt: skip


@pytest.mark.parametrize("pattern", REGEX_BOMBS)
def test_regex_bombs_stop_nobody(client, pattern: str) -> None:
    """Each ends in seconds, as an expression of its own, in a schema and in a tool's."""
    schema = {"type": "object", "properties": {"x": {"type": "string", "pattern": pattern}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    for url, body in (
        (URL, {**ASKED, "max_tokens": 4, "guided_regex": pattern}),
        (URL, {**ASKED, "max_tokens": 4, "guided_json": schema}),
        (CHAT, {**chat, "tools": [tool], "tool_choice": "required"}),
    ):
        began = perf_counter()
        response = client.post(url, json=body)
        assert response.status_code in (200, 400), response.text
        assert perf_counter() - began < 20


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    """JSON schemas of the supported kinds, nested up to three levels."""
    bounds = st.tuples(st.integers(-20, 20), st.integers(0, 20), st.sampled_from([1, 2, 5]))
    numbers = st.tuples(st.sampled_from(["integer", "number"]), bounds).map(
        lambda one: {"type": one[0], "minimum": one[1][0], "maximum": one[1][0] + one[1][1],
                     "multipleOf": one[1][2]}
    )  # fmt: skip
    texts = st.tuples(st.integers(0, 3), st.integers(0, 4)).map(
        lambda one: {"type": "string", "minLength": one[0], "maxLength": sum(one)}
    )
    values = st.lists(
        st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=5),
        min_size=1, max_size=4,
    )  # fmt: skip
    fixed = [
        {"type": "null"}, {"type": "boolean"}, {"const": {"a": [1]}}, {"const": 'é"\\'},
        {"type": "string", "pattern": "^[a-c]{1,4}$"}, {"type": "string", "format": "uuid"},
        {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 9},
    ]  # fmt: skip
    leaves = st.one_of(st.sampled_from(fixed), numbers, texts, values.map(lambda v: {"enum": v}))

    def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        names = st.sampled_from(["a", "b c", "é", '"q"', "x-1"])
        fields = st.dictionaries(names, inner, max_size=3)
        objects = st.tuples(fields, st.booleans(), st.booleans()).map(
            lambda one: {"type": "object", "properties": one[0], "additionalProperties": False,
                         "required": sorted(one[0])[one[1]:] if one[2] else sorted(one[0])}
        )  # fmt: skip
        arrays = st.tuples(inner, st.integers(0, 2), st.integers(2, 3)).map(
            lambda one: {"type": "array", "items": one[0], "minItems": one[1], "maxItems": one[2]}
        )
        return st.one_of(objects, arrays, st.lists(inner, min_size=1, max_size=2).map(
            lambda some: {"anyOf": some}))  # fmt: skip

    return st.recursive(leaves, nested, max_leaves=5)


def check_schema(client: TestClient, schema: dict[str, Any], seed: int) -> None:
    body = {"guided_json": schema, "seed": seed, "temperature": 0.7, "max_tokens": 300}
    response = client.post(URL, json={**ASKED, **body})
    while response.status_code == 429:  # on a busy machine a form may not be tried in time
        response = client.post(URL, json={**ASKED, **body})
    if response.status_code == 400:  # such as a minimum above the maximum
        assume(False)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assume(choice["finish_reason"] == "stop")
    jsonschema.validate(
        json.loads(choice["text"]), schema, format_checker=jsonschema.FormatChecker()
    )


QUIET = {
    "deadline": None,
    "phases": (Phase.generate,),
    "suppress_health_check": list(HealthCheck),
}


@given(st.data())
@settings(max_examples=100, **QUIET)
def test_random_schemas(served, data) -> None:
    """The masks of 100 schemas, with random logits that prefer what closes a value."""
    schema = data.draw(schemas())
    size = served.model.config.vocab_size
    try:
        grammar = COMPILERS.setdefault(
            size, GrammarCompiler(served.tokenizer, size=size, eos_ids={0})
        ).compile(whole(json_part(schema, "it")))
    except ConfigError:
        assume(False)
    sampler = Sampler(SamplingParams(max_tokens=1, seed=data.draw(st.integers(0, 9)),
                                     grammar=grammar))  # fmt: skip
    logits_V = torch.zeros(size)
    logits_V[served.tokenizer.encode('"]},0')] = 6.0
    logits_V[0] = 9.0
    ids: list[int] = []
    while not sampler.complete and len(ids) < 400:
        ids.append(sampler.choose(logits_V)[0])
    assume(sampler.complete)
    text = served.tokenizer.decode(ids, skip_special_tokens=True)
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


COMPILERS: dict[int, GrammarCompiler] = {}


@pytest.mark.slow
@given(schemas(), st.integers(0, 9))
@settings(max_examples=1000, **QUIET)
def test_thousand_random_schemas_over_http(client, schema, seed: int) -> None:
    check_schema(client, schema, seed)
