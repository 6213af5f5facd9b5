"""lm-evaluation-harness's own command line, with the model class `moefit` registered."""

import sys

from moefit.errors import MoefitError

if __name__ == "__main__":
    try:
        from moefit.tasks.harness import command_line
        from moefit.tasks.lm import register
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("moefit"):
            raise
        sys.exit(
            "error: python -m moefit.tasks is lm-evaluation-harness's command line, and "
            f"{error.name} is not installed; run `pip install 'moefit[tasks]'`"
        )
    register()
    try:
        command_line()
    except MoefitError as error:
        sys.exit(f"error: {type(error).__name__}: {error}")
