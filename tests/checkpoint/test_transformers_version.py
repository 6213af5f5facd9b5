"""Versions of transformers with which a model would be computed wrongly are refused."""

import tomllib
from pathlib import Path

import pytest

import moefit
from moefit.checkpoint import config
from moefit.checkpoint.config import SUPPORTED_TRANSFORMERS, check_transformers
from moefit.errors import ConfigError


@pytest.mark.parametrize("version", ["5.25.0", "5.22.1", "6.0.0.dev0"])
def test_other_versions_are_refused_before_anything_is_loaded(version, monkeypatch) -> None:
    # transformers puts another module in its place while it imports some families.
    monkeypatch.setattr(config.transformers, "__version__", version)
    with pytest.raises(ConfigError, match=rf"{version} is installed.*pip install .*5\.24"):
        moefit.load("reference")


def test_the_declared_dependency_allows_the_supported_versions() -> None:
    check_transformers()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    (declared,) = (
        one for one in project["project"]["dependencies"] if one.startswith("transformers")
    )
    major, newest = SUPPORTED_TRANSFORMERS[-1].split(".")
    minors = [int(one.removeprefix(f"{major}.")) for one in SUPPORTED_TRANSFORMERS]
    assert minors == list(range(minors[0], int(newest) + 1))
    assert declared == f"transformers>={major}.{minors[0]},<{major}.{int(newest) + 1}"
