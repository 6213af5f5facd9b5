"""Read configurations in YAML in bounded time and memory."""

import re
from typing import Any, cast

import yaml

from moefit.errors import ConfigError, in_brief

_MERGE = "tag:yaml.org,2002:merge"
MAX_CHARACTERS, MAX_VALUES, MAX_DEPTH = 1 << 18, 10_000, 32  # of a configuration


class RepeatedFieldError(ConfigError):
    """A field occurs twice in a mapping.

    Args:
        field: The field.
        lines: Where, from 1 on.

    Attributes:
        lines: Where.
    """

    def __init__(self, field: str, lines: tuple[int, int]):
        where = f"on lines {lines[0]} and {lines[1]}" if lines[0] != lines[1] else "on one line"
        super().__init__(f"the field {field[:80]!r} occurs twice, {where}; remove one of them")
        self.lines = lines


class _Yaml(yaml.SafeLoader):
    """YAML in which 3e-4 and 1.5e3 are numbers, and no field occurs twice.

    In YAML 1.1 such numbers would be text, and of equal fields the last one would count.
    """

    def get_single_node(self) -> Any:
        """Return the node of the text. Raises RepeatedFieldError for a field that occurs twice.

        Fields are compared as written: constructing adds those of merged mappings to nodes.
        """
        node = super().get_single_node()
        _check_fields(node)
        return node


def _check_fields(root: Any) -> None:
    """Raise RepeatedFieldError for a field that occurs twice in a mapping, in each node once."""
    waiting, seen = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _check_mapping(node)
            waiting += [one for pair in reversed(node.value) for one in reversed(pair)]
        else:
            waiting += reversed(node.value)


def _check_mapping(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in lines:
            raise RepeatedFieldError(key.value, (lines[name], line))
        lines[name] = line


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text, read in bounded time and memory.

    Args:
        text: The text. Aliases count with the size of the values that they refer to.

    Raises:
        ConfigError: The text is not YAML, or is too large or too deeply nested.
    """
    try:
        _check_size(text)
        return yaml.load(text, Loader=_Yaml)
    except ConfigError:
        raise
    except Exception as error:  # invalid dates, tags and so on raise many types
        raise ConfigError(f"it is not YAML: {in_brief(error, 600)}") from error


def _check_size(text: str) -> None:
    """Raise ConfigError for a text with too many or too deeply nested values."""
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"{len(text):,} characters, but a configuration may have at most {MAX_CHARACTERS:,}"
        )
    counter = _ValueCounter()
    for event in cast(Any, yaml).parse(text, Loader=yaml.SafeLoader):
        counter.add(event)
        if len(counter.open_values) > MAX_DEPTH:
            raise ConfigError(f"it is nested more than {MAX_DEPTH} levels deep")
        if counter.count > MAX_VALUES:
            raise ConfigError(f"it has more than {MAX_VALUES:,} values with aliases expanded")


class _ValueCounter:
    """Counts the values of a YAML text with aliases expanded."""

    def __init__(self):
        self.count = 0
        self.open_values: list[tuple[str | None, int]] = []
        """Anchors of open collections, and the count before each."""
        self._sizes: dict[str | None, int] = {}

    def add(self, event: Any) -> None:
        """Add a parser event; raises ConfigError for an alias inside the value that it names."""
        if isinstance(event, yaml.CollectionStartEvent):
            self.open_values.append((event.anchor, self.count))
            self.count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = self.open_values.pop()
            self._sizes[anchor] = self.count - before
        elif isinstance(event, yaml.ScalarEvent):
            self._sizes[event.anchor] = 1
            self.count += 1
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in self.open_values):
                raise ConfigError(f"the alias *{event.anchor} refers to a value that contains it")
            self.count += self._sizes.get(event.anchor, 1)
