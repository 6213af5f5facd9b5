"""How requests share a model, as one record.

Owns the settings' defaults and what they may be. Knows nothing of the model that they are for.
"""

from dataclasses import dataclass, fields

from moefit.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How requests share the model.

    max_concurrency: requests that run at once. max_model_len: prompt and answer of one request;
    None is the model's own, as far as the context's tokens go. prefill_chunk: tokens of prompts in
    one step, so that decoding goes on between. max_waiting: requests that may wait for a place.
    """

    max_concurrency: int = 16
    max_model_len: int | None = None
    prefill_chunk: int = 128
    max_waiting: int = 1024

    def check(self) -> None:
        """Raise ConfigError for a value that cannot be."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "max_model_len":
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{field.name}={value!r}, but it is a whole number, 1 or more")
