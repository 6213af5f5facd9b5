"""`python -m moefit` is the same as `moefit`."""

from moefit.cli import main

main()
