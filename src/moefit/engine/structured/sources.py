"""Write JSON schemas, regular expressions, choices and grammars as parts of one grammar.

A grammar is the text that llguidance compiles: a list of parts, of which the first is the start and
refers to the others by name. Its text identifies it, so equal requests share what was compiled.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moefit.engine.structured.bounds import check_grammar, check_regex, check_schema, check_text
from moefit.engine.structured.library import any_to_lark, regex_to_lark
from moefit.errors import ConfigError

Part = Mapping[str, Any]
"""A part of a grammar: `json_schema` or `lark_grammar`."""

BODY = "body"
"""Name of the part that the whole answer must match."""
_SPACE = "( |\\r?\\n[ \\t]{0,32})?"  # unbounded, some models never stop writing spaces
_NONE = ""
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def json_part(schema: Any, what: str, *, spaces: bool = True) -> Part:
    """Return the part for values that a JSON schema admits.

    Args:
        schema: A JSON schema: an object, True or False, or the text of one.
        what: Its name in messages.
        spaces: Whether blanks and line feeds are allowed between tokens of the JSON.

    Raises:
        ConfigError: If the schema is too large or no schema.
    """
    if isinstance(schema, str):
        check_text(schema, what)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{what} is not JSON: {error}") from error
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise ConfigError(f"{what} is a {type(schema).__name__}, but a JSON schema is an object")
    check_schema(schema, what)
    check_text(json.dumps(schema), what)
    # Written last: a schema of a client cannot ask for less strict rules or other blanks.
    options = {"whitespace_pattern": _SPACE if spaces else _NONE, "lenient": False}
    return {"json_schema": {**schema, "x-guidance": options}}


def regex_part(pattern: str, what: str) -> Part:
    """Return the part for texts that a regular expression matches as a whole.

    Raises:
        ConfigError: If the expression is too large.
    """
    check_regex(pattern, what)
    if not pattern:
        raise ConfigError(f"{what} is empty and matches nothing; give a regular expression")
    return {"lark_grammar": f"start: /{regex_to_lark(pattern)}/"}


def choice_part(choices: Sequence[str], what: str) -> Part:
    """Return the part for one of several texts.

    Raises:
        ConfigError: If there are none, too many or an empty one.
    """
    if not choices or not all(choices):
        raise ConfigError(f"{what} needs at least one text, and none that is empty")
    check_text("".join(choices), what)
    texts = " | ".join(map(literal, dict.fromkeys(choices)))
    # One terminal, since the library follows at most 1,000 rules at a time.
    return {"lark_grammar": f"start: CHOICE\nCHOICE: {texts}"}


def grammar_part(grammar: str, what: str) -> Part:
    """Return the part for a grammar in Lark's syntax, or in that of llama.cpp (GBNF).

    Raises:
        ConfigError: If the grammar is too large or cannot be read.
    """
    check_text(grammar, what)
    if "::=" not in grammar:
        check_grammar(grammar, what)
        return {"lark_grammar": grammar}
    converted = any_to_lark(grammar, what)
    check_grammar(converted.replace("%llguidance {}", ""), what)
    return {"lark_grammar": converted}


def literal(text: str) -> str:
    r"""Return a text as a string of a grammar.

    >>> literal('say "é"')
    '"say \\"\\u00e9\\""'
    """
    return json.dumps(text).replace("\x7f", "\\u007f")  # no control characters


def whole(part: Part) -> str:
    """Return the grammar of answers that match one part."""
    return compose(f"start: @{BODY}", {BODY: part})


def compose(start: str, parts: Mapping[str, Part]) -> str:
    """Return the grammar with these rules, which refer to parts as `@name`.

    >>> compose("start: @a", {"a": {"lark_grammar": "start: /b/"}})[:60]
    '{"grammars": [{"name": "start", "lark_grammar": "start: @a"}'
    """
    named = [{"name": name, **part} for name, part in parts.items()]
    return json.dumps({"grammars": [{"name": "start", "lark_grammar": start}, *named]})
