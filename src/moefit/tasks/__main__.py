"""lm-evaluation-harness's own command line, with the model class `moefit` registered."""

import sys

from moefit.errors import MoefitError
from moefit.tasks.harness import command_line
from moefit.tasks.lm import register

if __name__ == "__main__":
    register()
    try:
        command_line()
    except MoefitError as error:
        sys.exit(f"error: {type(error).__name__}: {error}")
