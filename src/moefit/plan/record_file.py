"""A record in a file: JSON with a version, written whole or not at all, read with a clear word.

Owns what may be wrong with such a file and how that is said. Knows nothing of what records hold.
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moefit.errors import ConfigError

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordKind:
    """One kind of record. version_at: the keys that lead to its version; indent: for people.

    make, again, elsewhere: what to do where there is no such file, where it is of no use, and
    where it cannot be written.
    """

    name: str
    version: int
    version_at: tuple[str, ...]
    make: str
    again: str
    elsewhere: str
    indent: int | None = None

    def write(self, values: Mapping[str, Any], path: Path) -> None:
        """Raises ConfigError if the file cannot be written; what was there before then stays."""
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(values, indent=self.indent) + "\n", encoding="utf-8")
            part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            raise ConfigError(
                f"cannot write the {self.name} {path}: {error.strerror or error}; {self.elsewhere}"
            ) from error

    def read(self, path: Path, made_of: Callable[[Mapping[str, Any]], Record]) -> Record:
        """The record that `made_of` makes of the file's values.

        It may raise KeyError, TypeError, ValueError or AttributeError for values that are none.
        Raises ConfigError for a file that is not there, no such record, or of another version.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"there is no {self.name} {path}; {self.make}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not a {self.name} ({error}); {self.again}") from error
        if (version := self._version_of(values)) != self.version:
            raise ConfigError(
                f"{path} is a {self.name} of version {version!r}, and this moefit reads version "
                f"{self.version}; {self.again}"
            )
        try:
            return made_of(values)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ConfigError(
                f"{path} is a damaged {self.name} ({error!r}); {self.again}"
            ) from error

    def _version_of(self, values: Any) -> Any:
        for key in self.version_at:
            values = values.get(key) if isinstance(values, dict) else None
        return values
