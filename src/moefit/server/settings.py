"""How a server presents itself, and where its limits are. Knows nothing of models."""

from dataclasses import dataclass

from moefit.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """What `moefit serve` takes beside the model's and the engine's settings.

    name: the model's name in requests and answers. origins: web pages of other origins that may
    ask. answers: the most that one request may ask for, n times its prompts; logprobs: likewise of
    log-probabilities, each of which takes some 150 bytes until it is sent. chat_tokens: the most
    tokens of a chat answer whose request does not say. body_bytes: of one body; bodies_bytes: of
    all together whose requests are not answered yet. connections: the most at a time.
    wait_seconds: how long the head or the body of a request is waited for, and for a client that
    does not read its answer, up to twice that.
    idle_seconds: how long a connection is kept between requests.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    answers: int = 128
    logprobs: int = 1 << 19
    chat_tokens: int = 512
    body_bytes: int = 4 * MIB
    bodies_bytes: int = 32 * MIB
    connections: int = 1024
    wait_seconds: float = 30.0
    idle_seconds: int = 30
    drain_seconds: float = 30.0

    def check(self) -> None:
        """Raise ConfigError for a key that is none, or that headers do not carry alike."""
        key = self.api_key
        if key == "":
            raise ConfigError(
                "the key (--api-key) is empty, and everybody would be let in; give one, such as "
                "what `openssl rand -hex 16` prints, or leave the option out"
            )
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(
                "the key (--api-key, MOEFIT_API_KEY) has spaces, control characters or letters "
                "beyond ASCII, which clients send in different ways; give another, such as what "
                "`openssl rand -hex 16` prints"
            )
