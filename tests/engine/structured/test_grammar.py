"""Grammars, token by token: random tokens under the mask match the grammar for any tokenizer."""

import json
import random
import re
from time import perf_counter

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefit.checkpoint.tiktoken_file import read_ranked_tokens
from moefit.engine.structured import grammar as grammars
from moefit.engine.structured.grammar import GrammarCompiler, GrammarError
from moefit.engine.structured.library import INSTALL
from moefit.engine.structured.sources import (
    choice_part,
    compose,
    grammar_part,
    json_part,
    regex_part,
    whole,
)
from moefit.errors import ConfigError
from tests.checkpoint.test_tiktoken_file import ranks_of, written
from tests.engine.structured.test_vocabulary import TEXTS, llama
from tests.engine.test_detokenize import byte_fallback, reference

SIZE = 4096
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "é", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def compiler(tokenizer, **how) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, size=SIZE, **({"eos_ids": {0}} | how))


@pytest.fixture(scope="module")
def shared() -> GrammarCompiler:
    return compiler(reference())


def written_by_chance(compiled, tokenizer, seed: int, most: int = 400) -> tuple[str, bool]:
    """Return a text of tokens that the mask allows, closing ones preferred, and if it is whole."""
    chance, state, ids = random.Random(seed), compiled.start(), []
    closing = [one for text in ('"', "}", "]", ",") for one in tokenizer.encode(text)]
    for _ in range(most):
        allowed = np.flatnonzero(state.allowed(SIZE))
        assert len(allowed), "some token is allowed until the end"
        if 0 in allowed and (len(allowed) == 1 or chance.random() < 0.5):
            return tokenizer.decode(ids), True
        likely = [one for one in allowed if one in closing]
        token = chance.choice(likely if likely and chance.random() < 0.5 else list(allowed))
        if token == 0:
            return tokenizer.decode(ids), True
        ids.append(int(token))
        state.accept(ids[-1])
        if state.complete:
            return tokenizer.decode(ids), True
    return tokenizer.decode(ids), False


@pytest.mark.parametrize("kind", ["byte-level", "words", "llama", "metaspace", "tiktoken"])
def test_answers_match_for_any_tokenizer(kind: str, tmp_path) -> None:
    if kind == "tiktoken":
        tokenizer = read_ranked_tokens(written(tmp_path, ranks_of(TEXTS)))
    elif kind in ("llama", "metaspace"):
        tokenizer = llama(kind == "metaspace")
    else:
        tokenizer = reference() if kind == "byte-level" else byte_fallback()
    compiled = compiler(tokenizer).compile(whole(json_part(PERSON, "it")))
    for seed in range(5):
        text, ended = written_by_chance(compiled, tokenizer, seed)
        if ended:
            jsonschema.validate(json.loads(text), PERSON)
    assert ended
    compiled = compiler(tokenizer).compile(whole(regex_part('[a-c]{2}/"é', "it")))
    text, ended = written_by_chance(compiled, tokenizer, 0)
    assert ended and re.fullmatch('[a-c]{2}/"é', text)


def test_answers_end_only_where_the_grammar_does(shared) -> None:
    state = shared.compile(whole(choice_part(["yes", "yesterday"], "it"))).start()
    for letter in "yes":
        assert not state.allowed(SIZE)[0] and not state.complete
        state.accept(reference().convert_tokens_to_ids(letter))
    assert state.allowed(SIZE)[0] and not state.complete
    for letter in "terday":
        state.accept(reference().convert_tokens_to_ids(letter))
    assert state.complete


def test_states_are_independent(shared) -> None:
    compiled = shared.compile(whole(regex_part("ab|cd", "it")))
    first, second = compiled.start(), compiled.start()
    before = second.allowed(SIZE)
    first.accept(reference().convert_tokens_to_ids("a"))
    assert (second.allowed(SIZE) == before).all()
    assert not (first.allowed(SIZE) == before).all()


def test_mask_has_the_length_of_the_logits(shared) -> None:
    state = shared.compile(whole(regex_part("a*", "it"))).start()
    long = state.allowed(SIZE + 100)
    assert len(long) == SIZE + 100 and not long[SIZE:].any()
    assert (state.allowed(50) == long[:50]).all()


def test_model_without_end_of_sequence() -> None:
    state = compiler(reference(), eos_ids=()).compile(whole(choice_part(["a"], "it"))).start()
    assert not state.complete
    state.accept(reference().convert_tokens_to_ids("a"))
    assert state.complete and not state.allowed(SIZE).any()


def test_special_tokens_match_no_text() -> None:
    tokenizer = llama(metaspace=True)
    tokenizer.add_tokens(["<tool_call>"])
    marker = tokenizer.convert_tokens_to_ids("<tool_call>")
    made = GrammarCompiler(tokenizer, size=len(tokenizer), eos_ids={0})
    text = made.compile(whole(regex_part("(?s:.*)", "it"))).start()
    assert not text.allowed(len(tokenizer))[marker]
    by_id = made.compile(compose(f"start: <[{marker}]>", {})).start()
    assert np.flatnonzero(by_id.allowed(len(tokenizer))).tolist() == [marker]


def test_equal_grammars_are_compiled_once(shared, monkeypatch) -> None:
    monkeypatch.setattr(grammars, "MAX_GRAMMARS", 2)
    one = shared.compile(whole(regex_part("a", "it")))
    two = shared.compile(whole(regex_part("b", "it")))
    assert shared.compile(whole(regex_part("a", "it"))) is one and len(shared) == 2
    shared.compile(whole(regex_part("c", "it")))  # the least recently used, b, goes
    assert shared.compile(whole(regex_part("a", "it"))) is one
    assert shared.compile(whole(regex_part("b", "it"))) is not two
    monkeypatch.setattr(grammars, "MAX_CACHED_TEXT", 300)
    shared.compile(whole(choice_part(["x" * 400], "it")))
    assert len(shared) == 1, "the newest is kept whatever its size"


# 2 ** 27 combinations of properties.
COMBINED = {
    "allOf": [
        {"anyOf": [{"properties": {f"{n}": {}, f"{k}": {}}} for k in (1, 2)]} for n in range(3, 30)
    ]
}


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (lambda: json_part(COMBINED, "it"), "fewer of .ref, allOf, anyOf"),
        (lambda: json_part({"uniqueItems": True}, "it"), "uses uniqueItems, which structured"),
        (lambda: json_part({"not": {}, "contains": {}}, "it"), "not, contains|contains, not"),
        (lambda: json_part({"type": "objekt"}, "it"), "objekt"),
        (lambda: json_part({"$ref": "http://a/b"}, "it"), "http://a/b"),
        (lambda: json_part({"$ref": "file:///etc/passwd"}, "it"), "file:///etc/passwd"),
        (lambda: json_part({"type": "string", "pattern": "(?=a)"}, "it"), "look-around"),
        (lambda: json_part(False, "it"), "not"),
        (lambda: json_part("{", "it"), "is not JSON"),
        (lambda: json_part("[1]", "it"), "is a list"),
        (lambda: json_part({"minimum": 3, "maximum": 2, "type": "integer"}, "it"), "greater than"),
        (lambda: json_part({"x-guidance": {"lenient": True}, "not": {}}, "it"), "uses not"),
        (lambda: json_part({"multipleOf": 9999991}, "it"), "multipleOf: 9999991"),
        (lambda: json_part({"multipleOf": 1e-9}, "it"), "multipleOf: 1e-09"),
        (lambda: json_part({"type": "integer", "multipleOf": 0}, "it"), "multipleOf: 0"),
        (lambda: regex_part("(", "it"), "unclosed group"),
        (lambda: regex_part("", "it"), "is empty"),
        (lambda: regex_part("a&b", "it"), "."),
        (lambda: grammar_part("start: x", "it"), "unknown name"),
        (lambda: grammar_part("root ::= (", "it"), "not valid GBNF"),
        (lambda: grammar_part('start: start "a"', "it"), "no text matches|empty|NoExt"),
        (lambda: choice_part([], "it"), "at least one"),
    ],
)  # fmt: skip
def test_invalid_grammars_raise(shared, part, words: str) -> None:
    if words == ".":
        shared.compile(whole(part()))
        return
    with pytest.raises(ConfigError, match=words):
        shared.compile(whole(part()))


GROWS = ["(.*e.{200}t.*)", "((.*e.{30}t.*)(.*a.{30}n.*))+"]


@pytest.mark.parametrize("pattern", GROWS)
def test_expressions_that_grow_end_with_an_error(shared, pattern: str) -> None:
    """Their automata are too large to build; what is built of one while an answer is written is
    bounded, in time too."""
    state = shared.compile(whole(regex_part(pattern, "it"))).start()
    chance, slowest = random.Random(0), 0.0
    with pytest.raises(GrammarError, match="too complex"):
        for _ in range(1000):
            began = perf_counter()
            allowed = np.flatnonzero(state.allowed(SIZE))
            slowest = max(slowest, perf_counter() - began)
            state.accept(int(chance.choice([one for one in allowed if one])))
    assert slowest < 1


def test_missing_library_is_named(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ConfigError, match=re.escape(INSTALL)):
        compiler(reference()).compile(whole(json_part({}, "it")))
    with pytest.raises(ConfigError, match=re.escape(INSTALL)):
        regex_part("a", "it")


def test_gbnf_is_read(shared) -> None:
    compiled = shared.compile(whole(grammar_part('root ::= "a" [0-9]{2} x\nx ::= "!"', "it")))
    text, ended = written_by_chance(compiled, reference(), 0)
    assert ended and re.fullmatch(r"a\d\d!", text)


@given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
@settings(max_examples=25)
def test_any_text_can_be_a_choice(text: str) -> None:
    state = CHOICES.compile(whole(choice_part([text], "it"))).start()
    ids: list[int] = []
    while not state.complete:
        ids.append(int(np.flatnonzero(state.allowed(SIZE))[0]))
        state.accept(ids[-1])
    assert reference().decode(ids) == text


def test_forced_texts_have_the_models_own_tokens(shared) -> None:
    text = "    return self.value"
    state = shared.compile(whole(choice_part([text], "it"))).start()
    for token in reference().encode(text):
        assert np.flatnonzero(state.allowed(SIZE)).tolist() == [token]
        state.accept(token)
    assert state.complete


CHOICES = compiler(reference())
