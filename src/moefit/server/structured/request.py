"""The grammar that a request asks for, from OpenAI's and vLLM's fields."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moefit.engine.structured.grammar import Grammar, GrammarCompiler, UntriedError
from moefit.engine.structured.sources import (
    ANY_OBJECT,
    BODY,
    Part,
    choice_part,
    compose,
    grammar_part,
    json_part,
    regex_part,
    whole,
)
from moefit.errors import ConfigError
from moefit.server.errors import APIError, naming
from moefit.server.openai_schema import GenerationRequest
from moefit.server.schema.structured import JsonObjectFormat, JsonSchemaFormat, StructuredOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A part of a grammar, and the field of the request that asks for it."""

    field: str
    part: Part


def compiled(grammars: GrammarCompiler, start: str, forms: Mapping[str, Form]) -> Grammar:
    """Return a grammar of several parts.

    Args:
        grammars: Keeps it.
        start: Rules that refer to the parts as `@name`.
        forms: The parts by name.

    Raises:
        APIError: If a part is not supported, naming its field.
        ConfigError: If these parts cannot be compiled together.
        UntriedError: If it is not compiled yet, which takes time.
    """
    text = compose(start, {name: form.part for name, form in forms.items()})
    if (known := grammars.compiled(text)) is not None:
        return known
    parts = [whole(form.part) for form in forms.values()]
    for form, part in zip(forms.values(), parts, strict=True):
        if why := grammars.verdict(part):
            with naming(form.field):
                raise ConfigError(why)
    if why := grammars.verdict(text):
        raise ConfigError(why)
    raise UntriedError(text, parts)


def compiled_form(grammars: GrammarCompiler, form: Form | None) -> Grammar | None:
    """Return the grammar of answers in one form; None for any text. Raises like `compiled`."""
    return None if form is None else compiled(grammars, f"start: @{BODY}", {BODY: form})


def answer_form(body: GenerationRequest) -> Form | None:
    """Return the form that the answer must have; None for any text.

    Raises:
        APIError: If several are given, or one is invalid or too large.
    """
    given = [*_of_format(body), *_of_outputs(body), *_of_guides(body)]
    if len(given) > 1:
        raise APIError(
            400,
            f"{given[0][0]} and {given[1][0]} both restrict the answer; give one of them",
            param=given[1][0],
            code="invalid_value",
        )
    if not given:
        return None
    (field, kind, source), *_ = given
    spaces = not (body.structured_outputs and body.structured_outputs.disable_any_whitespace)
    with naming(field):
        return Form(field=field, part=_part(kind, source, spaces=spaces))


def _part(kind: str, source: Any, *, spaces: bool) -> Part:
    if kind == "json":
        return json_part(source, "the schema", spaces=spaces)
    if kind == "regex":
        return regex_part(source, "the regular expression")
    if kind == "choice":
        return choice_part(source, "the list of choices")
    return grammar_part(source, "the grammar")


_Given = tuple[str, str, object]
"""Field, kind and source."""


def _of_format(body: GenerationRequest) -> list[_Given]:
    wanted = body.response_format
    if isinstance(wanted, JsonObjectFormat):
        return [("response_format", "json", ANY_OBJECT)]
    if isinstance(wanted, JsonSchemaFormat):
        return [("response_format.json_schema.schema", "json", wanted.json_schema.schema_)]
    return []


def _of_outputs(body: GenerationRequest) -> list[_Given]:
    wanted = body.structured_outputs or StructuredOutputs()
    found: list[_Given] = [("structured_outputs.json_object", "json", ANY_OBJECT)]
    if not wanted.json_object:
        found.clear()
    sources = {"json": wanted.json_, "regex": wanted.regex, "choice": wanted.choice}
    sources["grammar"] = wanted.grammar
    found += [
        (f"structured_outputs.{kind}", kind, source)
        for kind, source in sources.items()
        if source is not None
    ]
    if body.structured_outputs is not None and not found:
        raise APIError(
            400,
            "structured_outputs restricts nothing; give one of json, regex, choice, grammar and "
            "json_object",
            param="structured_outputs",
            code="invalid_value",
        )
    return found


def _of_guides(body: GenerationRequest) -> list[_Given]:
    sources = {
        "json": body.guided_json,
        "regex": body.guided_regex,
        "choice": body.guided_choice,
        "grammar": body.guided_grammar,
    }
    return [
        (f"guided_{kind}", kind, source) for kind, source in sources.items() if source is not None
    ]
