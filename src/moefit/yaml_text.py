"""Read configurations in YAML in bounded time and memory."""

import re
from typing import Any, cast

import yaml

from moefit.errors import ConfigError, in_brief

MAX_CHARACTERS, MAX_VALUES, MAX_DEPTH = 1 << 18, 10_000, 32  # of a configuration


class _Yaml(yaml.SafeLoader):
    """YAML in which 3e-4 and 1.5e3 are numbers; YAML 1.1 wants 3.0e-4 and 1.5e+3, else it's text.

    A resolver sees plain scalars alone, so that whatever stands in quotes stays text.
    """


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text, read in bounded time and memory.

    Args:
        text: The text. Aliases may be used as long as what they stand for, written out, is no
            more than a configuration can be.

    Raises:
        ConfigError: The text is not YAML, or too large, too deeply nested, or grows without
            bound by its aliases.
    """
    try:
        _refuse_bomb(text)
        return yaml.load(text, Loader=_Yaml)
    except ConfigError:
        raise
    except Exception as error:  # 2024-13-45 is no date, !!bool no is a KeyError, and so on
        raise ConfigError(f"it is not YAML: {in_brief(error, 600)}") from error


def _refuse_bomb(text: str) -> None:
    """Raise ConfigError for a text whose values could not be built or walked over in bounds.

    The parser's events come one by one, so what is too deep is refused where it becomes so.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"{len(text):,} characters, and a configuration has at most {MAX_CHARACTERS:,}"
        )
    extent = _Extent()
    for event in cast(Any, yaml).parse(text, Loader=yaml.SafeLoader):
        extent.hear(event)
        if len(extent.open_values) > MAX_DEPTH:
            raise ConfigError(f"nested more than {MAX_DEPTH} levels deep; a configuration has few")
        if extent.count > MAX_VALUES:
            raise ConfigError(
                f"more than {MAX_VALUES:,} values, aliases written out; a configuration has few"
            )


class _Extent:
    """How many values a YAML text has; an alias counts as many as what it stands for."""

    def __init__(self):
        self.count = 0
        self.open_values: list[tuple[str | None, int]] = []
        """Anchors, and how many values came before each."""
        self._sizes: dict[str | None, int] = {}

    def hear(self, event: Any) -> None:
        """Take the next event. Raises ConfigError for an alias within what it stands for."""
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
                raise ConfigError(f"the alias *{event.anchor} stands within what it stands for")
            self.count += self._sizes.get(event.anchor, 1)
