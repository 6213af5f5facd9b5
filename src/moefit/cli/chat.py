"""The command `chat`: with a model in this process or on a server."""

import sys
from contextlib import closing
from typing import Annotated

import typer

from moefit.cli.app import ApiKey, advanced, command, option, say
from moefit.cli.loading import CHAT_ENGINE, load_served, say_generation
from moefit.cli.options import (
    SAMPLING,
    SERVING,
    Following,
    GenerationConfig,
    SamplingOptions,
    ServingOptions,
    expand_options,
)
from moefit.engine.engine import Engine
from moefit.errors import ConfigError, MoefitError
from moefit.server.chat_backend import (
    ChatBackend,
    ChatOptions,
    ChatTurn,
    LocalChat,
    RemoteChat,
)
from moefit.server.client import Client
from moefit.server.tokenizer import RENDER_RESIDENT

HELP = "/new starts a new conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"
_SHOWN = {code: None for code in range(32) if chr(code) not in "\n\t"} | {127: None}


@command("chat")
@expand_options
def chat(
    model: Annotated[
        str | None, typer.Argument(help="Model, as for serve; not with --url.", show_default=False)
    ] = None,
    url: Annotated[
        str | None, option("URL of a server with OpenAI's API.", envvar="MOEFIT_URL")
    ] = None,
    api_key: ApiKey = None,
    system: Annotated[str | None, advanced("System message.")] = None,
    max_tokens: Annotated[int, option("Maximum number of tokens of one answer.", min=1)] = 256,
    sampling: SamplingOptions = SAMPLING,
    generation_config: GenerationConfig = Following.auto,
    options: ServingOptions = SERVING,
) -> None:
    """Print answers to standard output as they are generated."""
    chosen = ChatOptions(max_tokens=max_tokens, **sampling.given())
    if url is not None:
        if model is not None or options.is_served or generation_config is not Following.auto:
            raise ConfigError(
                "the server at --url has its model, memory and defaults; give one or the other"
            )
        _talk(RemoteChat(Client(url, api_key)), chosen, system)
        return
    if model is None:
        raise ConfigError("give a model, such as `reference`, or --url of a server")
    more = {
        "generation_config": generation_config.value,
        "helpers": RENDER_RESIDENT,
        "step_tokens": CHAT_ENGINE.step_tokens,
    }
    with load_served(model, options, **more) as served:
        if served.policy.mode == served.policy.prefill == "exact":  # others depend on residents
            served.fill()  # while the first message is written
        say_generation(served.generation)
        engine = Engine(served, CHAT_ENGINE)
        engine.start()
        try:
            _talk(LocalChat(model, engine), chosen, system)
        finally:
            engine.close()


def _talk(partner: ChatBackend, options: ChatOptions, system: str | None) -> None:
    if not partner.supports_chat:
        if system is not None:
            raise ConfigError(f"{partner.name} has no chat template; leave out --system")
        say(f"{partner.name} has no chat template: it continues the text that you give")
    say(HELP)
    beginning: list[ChatTurn] = [{"role": "system", "content": system}] if system else []
    turns = list(beginning)
    while (line := _ask()) is not None:
        if line == "/new":
            turns = list(beginning)
        elif line.startswith("/"):
            say(f"{line.split()[0]} is not a command: {HELP}")
        elif line:
            turns.append({"role": "user", "content": line})
            turns = _answer(partner, turns, options)


def _ask() -> str | None:
    """Return a line without its end; None to leave."""
    try:
        line = input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:
        print()
        say(HELP)
        return ""
    return None if line.strip() == "/quit" else line


def _answer(partner: ChatBackend, turns: list[ChatTurn], options: ChatOptions) -> list[ChatTurn]:
    """Print the answer, and return the conversation with it, or without the turn that failed."""
    answer = ""
    try:
        with closing(partner.generate(turns, options)) as pieces:
            for piece in pieces:
                answer += piece
                print(piece.translate(_SHOWN), end="", flush=True)
    except KeyboardInterrupt:
        say(" (stopped)")
    except MoefitError as error:
        say(f"error: {error}")
        return turns[:-1]
    print()
    return [*turns, {"role": "assistant", "content": answer}]
