"""Schemas, expressions and grammars that are too large are found by reading them once."""

from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moefit.engine.structured.bounds import (
    MAX_STATES,
    check_grammar,
    check_regex,
    check_schema,
    regex_states,
)
from moefit.errors import ConfigError


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("", 0),
        ("abc", 3),
        (r"[a-z{5}\]]{3}", 3),
        (r"\p{Lu}{2}\{7\}", 5),
        ("(ab|c){2,5}d", 21),
        ("(a{3}b){4}", 16),
        ("a{,7}", 7),
        ("a{2,}", 2),
        ("((a{10}){10}){10}", 1000),
        ("(a", 1),
        ("a)b", 3),
        ("[", 1),
        ("a{b}", 4),
    ],
)
def test_states_of_expressions(pattern: str, states: int) -> None:
    assert regex_states(pattern) == states


@given(st.text(alphabet="ab(){}[]\\19,|~p*?", max_size=40))
def test_any_expression_is_read(pattern: str) -> None:
    assert 0 <= regex_states(pattern) <= 60 * (MAX_STATES + 1)


BOMBS = [
    "((a{1000}){1000}){1000}",
    "a{100000}",
    "(" * 3000 + "a{9}" + "){9}" * 3000,
    "a{999999999999}",
    r"\p{L}{1,20000}",
]


@pytest.mark.parametrize("pattern", BOMBS)
def test_large_expressions_raise_at_once(pattern: str) -> None:
    began = perf_counter()
    with pytest.raises(ConfigError, match="10,000 are accepted"):
        check_regex(pattern, "the expression")
    with pytest.raises(ConfigError, match="10,000 are accepted"):
        check_schema({"items": [{"pattern": pattern}]}, "the schema")
    with pytest.raises(ConfigError, match="10,000 are accepted"):
        check_grammar(f"start: A\nA: /{pattern}/", "the grammar")
    assert perf_counter() - began < 1


@pytest.mark.parametrize(
    "grammar",
    [
        'start: A\nA: B{1000}\nB: C{1000}\nC: "x"{1000}',
        'start: A\nA: "x"~1000000',
        "start: A\n// B: /a/\nA: B B B\nB: /a{5000}/",
        "?start: _A\n_A.2: (/a{300}/ | /b{400}/)~20",
    ],
)
def test_large_grammars_raise(grammar: str) -> None:
    with pytest.raises(ConfigError, match="10,000 are accepted"):
        check_grammar(grammar, "the grammar")


def test_directives_raise() -> None:
    for name in ("json", "regex", "lark", "import", "llguidance"):
        with pytest.raises(ConfigError, match=f"%{name}, which is not accepted"):
            check_grammar(f"start: x\nx: %{name} {{}}", "the grammar")


def test_ordinary_grammars_pass() -> None:
    check_grammar('start: A b{2,3}\nA: /[0-9]{4}/ ("x" | "y"i)\nb: A start?\n%ignore " "', "it")
    check_grammar('start: A\nA: B\nB: A "x"', "it")  # a cycle: for the compiler to refuse


def test_large_schemas_raise() -> None:
    deep: dict = {}
    for _ in range(100):
        deep = {"items": deep}
    wide = {"properties": {f"p{n}": {} for n in range(1001)}}
    many = {"anyOf": [{"$ref": "#/a"}] * 1001}
    for schema, words in (
        (deep, "64 levels"),
        (wide, "1,001 entries in one properties"),
        (many, "1,001 \\$ref"),
        ({"enum": list(range(20_001))}, "20,000 values"),
        ({"pattern": "a" * (1 << 17)}, "131,072 bytes"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_schema(schema, "the schema")
