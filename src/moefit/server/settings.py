"""How a server presents itself, and where its limits are. Knows nothing of models."""

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What `moefit serve` takes beside the model's and the engine's settings.

    name: the model's name in requests and answers. origins: web pages of other origins that may
    ask. answers: the most that one request may ask for, n times its prompts. chat_tokens: the most
    tokens of a chat answer whose request does not say. connections: the most at a time.
    wait_seconds: how long the head or the body of a request is waited for, up to twice that.
    idle_seconds: how long a connection is kept between requests.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    answers: int = 128
    chat_tokens: int = 512
    body_bytes: int = 4 * MIB
    connections: int = 1024
    wait_seconds: float = 30.0
    idle_seconds: int = 30
    drain_seconds: float = 30.0
