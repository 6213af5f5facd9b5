"""`--config FILE.yaml`: options of a command from a file, below flags and environment.

Owns reading the file into the command's defaults; click then weighs them: a flag before a
variable, that before the file, that before what the command itself has.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from moefit.errors import ConfigError
from moefit.train.config import load_yaml


def read_options(path: Path, known: list[str]) -> dict[str, Any]:
    """Options by name, from a file that has no others. Raises ConfigError."""
    try:
        found = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{str(path)!r}: {error}") from error
    if not isinstance(found, dict | None):
        raise ConfigError(f"{str(path)!r} has no options; it is lines such as `port: 8000`")
    options: dict[str, Any] = {}
    for key, value in (found or {}).items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ConfigError(
                f"{str(path)!r}: there is no option {key!r}; the nearest is {near[0]!r}"
            )
        options[name] = value
    return options


def as_given(name: str, value: Any, *, several: bool) -> str | list[str] | None:
    """An option's value as a command line would have it. Raises ConfigError for what none could.

    several: the option may be repeated; one value alone is then a list of one.

    >>> as_given("port", 8000, several=False), as_given("cors_origin", "*", several=True)
    ('8000', ['*'])
    """
    if value is None:
        return None
    if several:
        values = value if isinstance(value, list) else [value]
        return [_word(name, one, "one value, or a list of them") for one in values]
    return _word(name, value, "one value")


def _word(name: str, value: Any, wanted: str) -> str:
    if isinstance(value, bool | list | dict | None):
        raise ConfigError(f"the option {name!r} is {wanted}, but the file has {value!r}")
    return str(value)


def _use(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        known = {str(one.name): one for one in context.command.params if one.name != "config"}
        options = {
            name: as_given(name, value, several=bool(getattr(known[name], "multiple", False)))
            for name, value in read_options(path, list(known)).items()
        }
        context.default_map = {**(context.default_map or {}), **options}
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file with any of these options; flags and MOEFIT_* variables come before it",
        is_eager=True,
        callback=_use,
    ),
]
