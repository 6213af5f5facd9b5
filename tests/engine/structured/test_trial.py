"""Grammars are tried in a process with limits."""

import json
from time import perf_counter

import pytest

from moefit.engine.structured.grammar import GrammarCompiler
from moefit.engine.structured.sources import choice_part, whole
from moefit.engine.structured.trial import tried
from moefit.errors import ConfigError
from tests.engine.test_detokenize import reference

BOMB = {"type": "integer", "multipleOf": 9999991}  # the library compiles it for minutes


def schema(value: object) -> str:
    return json.dumps({"grammars": [{"name": "it", "json_schema": value}]})


def test_valid_and_invalid_grammars() -> None:
    assert tried(schema({"type": "object"}), {}) == ""
    assert "uniqueItems" in tried(schema({"uniqueItems": True}), {})
    assert tried(schema({"$ref": "#/a", "a": {"allOf": [{"$ref": "#"}]}}), {}) != ""


def test_time_and_memory_are_limited() -> None:
    began = perf_counter()
    with pytest.raises(ConfigError, match="more than 1 seconds or 256 MiB"):
        tried(schema(BOMB), {}, seconds=1)
    with pytest.raises(ConfigError, match="or 16 MiB"):
        tried(schema(BOMB), {}, memory=16 << 20)
    assert perf_counter() - began < 60


def test_grammars_are_tried_once(monkeypatch) -> None:
    made = GrammarCompiler(reference(), size=4096, eos_ids={0})
    calls = []
    monkeypatch.setattr(
        "moefit.engine.structured.grammar.tried", lambda *given: calls.append(given) or ""
    )
    for choice in ("a", "b", "a"):
        made.check(whole(choice_part([choice], "it")))
    assert len(calls) == 2
    monkeypatch.setattr("moefit.engine.structured.grammar.tried", lambda *_: "it is wrong")
    for _ in range(2):
        with pytest.raises(ConfigError, match="it is wrong"):
            made.check(whole(choice_part(["c"], "it")))
