"""`--config FILE.yaml`: options of a command from a file, below flags and environment.

Owns reading the file into the command's defaults; click then weighs them: a flag before a
variable, that before the file, that before what the command itself has.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from moefit.errors import ConfigError


def read_options(path: Path, known: list[str]) -> dict[str, Any]:
    """Options by name, from a file that has no others. Raises ConfigError."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{str(path)!r} is not YAML: {error}") from error
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


def _use(context: typer.Context, path: Path | None) -> Path | None:
    if path is not None:
        known = [str(one.name) for one in context.command.params if one.name != "config"]
        context.default_map = {**(context.default_map or {}), **read_options(path, known)}
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
