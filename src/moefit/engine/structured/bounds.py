"""Limits on JSON schemas, regular expressions and grammars that clients send.

A short text can describe an automaton of any size: `((a{1000}){1000}){1000}` is a billion states.
These checks run before anything is compiled and take time linear in the text. What they admit,
llguidance compiles in a fraction of a second, within limits of its own.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from moefit.errors import ConfigError

MAX_TEXT = 64 << 10
"""Bytes of a schema, a regular expression, a grammar or a list of choices."""
MAX_STATES = 10_000
"""States of a regular expression, with counted repetitions written out."""
MAX_DEPTH = 64
MAX_NODES = 20_000
MAX_PROPERTIES = 1_000
MAX_REFERENCES = 1_000
MAX_MULTIPLE = 10_000

_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}|~\s*(\d+)(?:\s*\.\.\s*(\d+))?")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:[pPxu]\{[^}]*\}|.)", re.DOTALL)
_REGEX_ATOM = re.compile(f"{_ESCAPE.pattern}|{_CLASS.pattern}|.", re.DOTALL)
_GRAMMAR_ATOM = re.compile(
    r"//[^\n]*|(?P<text>\"(?:\\.|[^\"\\\n])*\")i?|(?P<regex>/(?:\\.|\[(?:\\.|[^\]\\])*\]|[^/\\\n])+/)"
    r"[a-z]*|(?P<name>[A-Za-z_]\w*)|.",
    re.DOTALL,
)
_DEFINITION = re.compile(
    r"^[ \t]*[?!]?(_?[A-Za-z]\w*)(?:\.-?\d+)?(?:\[[^\]]*\])?[ \t]*:(?!:)", re.M
)
_DIRECTIVE = re.compile(r"%(json|regex|lark|llguidance|import|declare|override|extend)\b")


def check_text(text: str, what: str) -> None:
    """Raise ConfigError if a text is too long or no Unicode, naming it `what`."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{what} has an unpaired surrogate at character {error.start}, which no text matches; "
            "leave it out"
        ) from error
    if size > MAX_TEXT:
        raise ConfigError(f"{what} has {size:,} bytes, but at most {MAX_TEXT:,} are accepted")


def regex_states(pattern: str) -> int:
    """Return the approximate number of states of a regular expression, repetitions written out.

    >>> regex_states("ab[c-f]{3}"), regex_states("((a{10}){10}){10}")
    (5, 1000)
    """
    return _states((match[0], 1) for match in _REGEX_ATOM.finditer(_hide_counts(pattern)))


def _hide_counts(pattern: str) -> str:
    """Return a pattern in which a counted repetition is one private character and its number."""
    parts, at = [], 0
    while at < len(pattern):
        match = _ESCAPE.match(pattern, at) or _CLASS.match(pattern, at)
        if match is None and (match := _COUNT.match(pattern, at)) and match[0][0] == "{":
            parts.append(f"\ue000{_times(match)}\ue001")
        else:
            parts.append(match[0] if match and match[0][0] != "~" else pattern[at])
        at += len(match[0]) if match and match[0][0] != "~" else 1
    return "".join(parts)


def _times(match: "re.Match[str]") -> int:
    numbers = [int(one[:9]) for one in match.groups() if one]
    return max([1, *numbers])


def _states(atoms: Iterator[tuple[str, int]]) -> int:
    """Return the size of a sequence of atoms with groups and repetitions, at most about a limit."""
    outer: list[tuple[int, int]] = []
    total = last = 0
    number: str | None = None
    for text, size in atoms:
        if text == "\ue000":
            number = ""
        elif text == "\ue001" and number is not None:
            last, number = min(last * int(number or 1), MAX_STATES + 1), None
        elif number is not None:
            number += text
        elif text == "(":
            outer.append((total, last))
            total = last = 0
        elif text == ")" and outer:
            inner = total + last
            total, last = outer.pop()
            total, last = total + last, inner
        else:
            total, last = total + last, size
    while outer:
        total += sum(outer.pop())
    return total + last


def check_regex(pattern: str, what: str) -> None:
    """Raise ConfigError if a regular expression is too long or too large."""
    check_text(pattern, what)
    if (states := regex_states(pattern)) > MAX_STATES:
        raise ConfigError(_too_large(what, states))


def _too_large(what: str, states: int) -> str:
    number = f"more than {MAX_STATES:,}" if states > MAX_STATES else f"{states:,}"
    return (
        f"{what} needs {number} states with its repetitions written out, but at most "
        f"{MAX_STATES:,} are accepted; use smaller counts, or * and +"
    )


def check_schema(schema: Any, what: str) -> None:
    """Raise ConfigError if a JSON schema is too deep or too large, or has too large patterns."""
    references = 0
    for nodes, (depth, node) in enumerate(_nodes(schema), 1):
        if depth > MAX_DEPTH:
            raise ConfigError(f"{what} is nested more than {MAX_DEPTH} levels deep")
        if nodes > MAX_NODES:
            raise ConfigError(f"{what} has more than {MAX_NODES:,} values")
        if isinstance(node, dict):
            references += "$ref" in node
            _check_object(node, what)
    if references > MAX_REFERENCES:
        raise ConfigError(f"{what} has {references:,} $ref, but at most {MAX_REFERENCES:,} work")


def _nodes(schema: Any) -> Iterator[tuple[int, Any]]:
    left: list[tuple[int, Any]] = [(1, schema)]
    while left:
        depth, node = left.pop()
        yield depth, node
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        left.extend((depth + 1, one) for one in inner)


def _check_object(node: Mapping[str, Any], what: str) -> None:
    for name in ("properties", "patternProperties", "required"):
        if isinstance(found := node.get(name), dict | list) and len(found) > MAX_PROPERTIES:
            raise ConfigError(
                f"{what} has {len(found):,} entries in one {name}, but at most "
                f"{MAX_PROPERTIES:,} work"
            )
    multiple = node.get("multipleOf")
    if isinstance(multiple, int | float) and not 1 / MAX_MULTIPLE <= multiple <= MAX_MULTIPLE:
        raise ConfigError(
            f"{what} has multipleOf: {multiple}, which needs as many states; from "
            f"{1 / MAX_MULTIPLE} to {MAX_MULTIPLE:,} are accepted"
        )
    patterns = [node.get("pattern")]
    if isinstance(more := node.get("patternProperties"), dict):
        patterns += more
    for pattern in patterns:
        if isinstance(pattern, str):
            check_regex(pattern, f"the pattern {pattern[:40]!r} in {what}")


def check_grammar(grammar: str, what: str) -> None:
    """Raise ConfigError if a grammar in Lark's syntax is too large or uses directives.

    Terminals (names in capitals) become regular expressions, so their sizes multiply through
    repeated references; rules do not.
    """
    check_text(grammar, what)
    if directive := _DIRECTIVE.search(grammar):
        raise ConfigError(
            f"{what} uses {directive[0]}, which is not accepted; write rules and terminals only, "
            "or use a JSON schema"
        )
    bodies = _definitions(grammar)
    if not bodies:
        raise ConfigError(f'{what} has no rules; write one named start, as in start: "a" | "b"')
    sizes: dict[str, int] = {}
    for name in bodies:
        size = _size_of(name, bodies, sizes)
        if size > MAX_STATES:
            raise ConfigError(_too_large(f"{name} in {what}", size))


def _definitions(grammar: str) -> dict[str, str]:
    """Return the bodies of rules and terminals by name."""
    found = list(_DEFINITION.finditer(grammar))
    ends = [*(match.start() for match in found), len(grammar)][1:]
    bodies = zip(found, ends, strict=False)  # text without a definition has an end, and no body
    return {match[1]: grammar[match.end() : end] for match, end in bodies}


def _size_of(name: str, bodies: Mapping[str, str], sizes: dict[str, int], depth: int = 0) -> int:
    """Return the size of a definition; `sizes` keeps those that are known."""
    if name in sizes:
        return sizes[name]
    if depth > MAX_DEPTH:
        raise ConfigError(f"terminals are nested more than {MAX_DEPTH} levels deep")
    sizes[name] = 1  # of a reference to itself, which the compiler refuses

    def size(match: "re.Match[str]") -> int:
        if match["regex"]:
            return regex_states(match["regex"][1:-1])
        inner = match["name"]
        if inner and inner.lstrip("_").isupper() and inner in bodies:
            return _size_of(inner, bodies, sizes, depth + 1)
        return len(match[0]) if match["text"] else 1

    sizes[name] = _states(_grammar_atoms(bodies[name], size))
    return sizes[name]


def _grammar_atoms(body: str, size: Any) -> Iterator[tuple[str, int]]:
    at = 0
    while at < len(body):
        count = _COUNT.match(body, at)
        if count is not None:
            yield from ((one, 0) for one in ("\ue000", *str(_times(count)), "\ue001"))
            at = count.end()
            continue
        match = _GRAMMAR_ATOM.match(body, at)
        assert match is not None, "the last alternative matches any character"
        at = match.end()
        if not match[0].isspace() and not match[0].startswith("//"):
            yield match[0], size(match)
