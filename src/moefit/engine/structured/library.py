"""The llguidance library, which compiles grammars and computes masks; an optional dependency.

Imported on first use only: most servers never need it.
"""

from typing import Any

from moefit.errors import ConfigError

INSTALL = "pip install 'moefit[structured]'"


def llguidance() -> Any:
    """Return the library.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError(
            "structured output needs the llguidance library, which is not installed on the server; "
            f"install it: {INSTALL}"
        ) from error
    return llguidance


def regex_to_lark(pattern: str) -> str:
    """Return a regular expression as it is written between slashes in a grammar."""
    return llguidance().regex_to_lark(pattern, "")


def any_to_lark(grammar: str, what: str) -> str:
    """Return a GBNF grammar in Lark's syntax.

    Raises:
        ConfigError: If it cannot be read.
    """
    llguidance()
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(grammar)
    except Exception as error:
        raise ConfigError(f"{what} is not valid GBNF: {str(error)[:300]}") from error
