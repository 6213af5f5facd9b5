"""Grammars are tried in a process with limits."""

import json
from time import perf_counter

from moefit.engine.structured.grammar import GrammarCompiler
from moefit.engine.structured.sources import choice_part, whole
from moefit.engine.structured.trial import tried
from tests.engine.test_detokenize import reference

BOMB = {"type": "integer", "multipleOf": 9999991}  # the library compiles it for minutes


def schema(value: object) -> str:
    return json.dumps({"grammars": [{"name": "it", "json_schema": value}]})


def test_valid_and_invalid_grammars() -> None:
    wrong = {"$ref": "#/a", "a": {"allOf": [{"$ref": "#"}]}}
    good, unknown, endless = tried(
        [schema({"type": "object"}), schema({"uniqueItems": True}), schema(wrong)], {}
    )
    assert good == "" and "uniqueItems" in unknown and endless


def test_time_and_memory_are_limited() -> None:
    began = perf_counter()
    (why,) = tried([schema(BOMB), schema({})], {}, seconds=1)
    assert "more than 1 seconds or 256 MiB" in why
    (why,) = tried([schema(BOMB)], {}, memory=16 << 20)
    assert "or 16 MiB" in why
    assert tried([schema({}), schema(BOMB)], {}, seconds=1) == [""]  # together, so not its fault
    assert perf_counter() - began < 60


def test_grammars_are_tried_once(monkeypatch) -> None:
    made = GrammarCompiler(reference(), size=4096, eos_ids={0})
    calls: list[list[str]] = []

    def fake(grammars: list[str], _: object) -> list[str]:
        calls.append(grammars)
        return ["it is wrong" if "bad" in one else "" for one in grammars]

    monkeypatch.setattr("moefit.engine.structured.grammar.tried", fake)
    a, b, bad = (whole(choice_part([choice], "it")) for choice in ("a", "b", "bad"))
    for part in (a, b, a):
        made.prepare(part, [part])
        assert made.verdict(part) == "" and made.compiled(part) is not None
    assert calls == [[a], [b]]
    for _ in range(2):
        made.prepare(bad, [a, bad])
        assert made.verdict(bad) == "it is wrong" and made.compiled(bad) is None
    assert calls == [[a], [b], [bad]]
