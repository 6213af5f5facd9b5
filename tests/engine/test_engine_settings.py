from typing import Any

import pytest

from moefit.engine.api import EngineSettings
from moefit.errors import ConfigError


@pytest.mark.parametrize(
    "setting",
    [{"max_concurrency": 0}, {"prefill_chunk": 1.5}, {"max_waiting": None}, {"max_model_len": -1},
     {"max_model_len": True}, {"prefill_chunk": "8"}],
    ids=str,
)  # fmt: skip
def test_invalid_setting_raises(setting: dict[str, Any]) -> None:
    ((name, value),) = setting.items()
    with pytest.raises(ConfigError, match=f"{name}={value!r}"):
        EngineSettings(**setting).check()


@pytest.mark.parametrize("setting", [{}, {"max_model_len": None}, {"max_waiting": 1}])
def test_settings_at_their_limits(setting: dict[str, Any]) -> None:
    EngineSettings(**setting).check()
