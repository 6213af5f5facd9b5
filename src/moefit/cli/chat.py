"""The command that talks with a model, here or on a server."""

import sys
from contextlib import closing
from typing import Annotated

import typer

from moefit.cli.app import ADVANCED, command, say
from moefit.cli.budget import ApiKey
from moefit.cli.loading import load_served, say_generation
from moefit.cli.options import (
    MEMORY_OPTIONS,
    MISS_OPTIONS,
    SAMPLING_OPTIONS,
    Following,
    GenerationConfig,
    MemoryOptions,
    MissOptions,
    SamplingOptions,
    expand_options,
)
from moefit.cli.planned import NO_PLAN, PlanOptions
from moefit.engine.engine import Engine
from moefit.errors import ConfigError, MoefitError
from moefit.server.client import ChatBackend, ChatOptions, ChatTurn, Client, LocalChat, RemoteChat
from moefit.server.tokenizer import RENDER_RESIDENT

HELP = "/new begins anew, /quit (or ctrl-D) ends; ctrl-C stops an answer"
_SHOWN = {code: None for code in range(32) if chr(code) not in "\n\t"} | {127: None}


@command("chat")
@expand_options
def chat(
    model: Annotated[str | None, typer.Argument(help="as for serve; not with --url")] = None,
    url: Annotated[
        str | None, typer.Option(help="URL of a server with OpenAI's API", envvar="MOEFIT_URL")
    ] = None,
    api_key: ApiKey = None,
    system: Annotated[
        str | None, typer.Option(help="system message", rich_help_panel=ADVANCED)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens of one answer")] = 256,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=2,
            help="0 is greedy; if not given, the server's, or the model's and else 0.7",
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="if not given, the server's, or the model's and else 1",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    drawn: SamplingOptions = SAMPLING_OPTIONS,
    seed: Annotated[
        int | None, typer.Option(help="seed of sampling", rich_help_panel=ADVANCED)
    ] = None,
    generation_config: GenerationConfig = Following.auto,
    room: MemoryOptions = MEMORY_OPTIONS,
    misses: MissOptions = MISS_OPTIONS,
    planned: PlanOptions = NO_PLAN,
) -> None:
    """Answers go to standard output as they come."""
    options = ChatOptions(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, **drawn.given()
    )
    if url is not None:
        followed = generation_config is Following.auto
        if model is not None or room.wanted or misses.wanted or planned.wanted or not followed:
            raise ConfigError(
                "the server at --url has its model, memory and defaults; give one or the other"
            )
        _talk(RemoteChat(Client(url, api_key)), options, system)
        return
    if model is None:
        raise ConfigError("give a model, such as `reference`, or --url of a server")
    more = {"generation_config": generation_config.value, "helpers": RENDER_RESIDENT}
    with load_served(model, room, misses, planned, **more) as served:
        say_generation(served.generation)
        engine = Engine(served)
        engine.start()
        try:
            _talk(LocalChat(model, engine), options, system)
        finally:
            engine.close()


def _talk(partner: ChatBackend, options: ChatOptions, system: str | None) -> None:
    if not partner.supports_chat:
        if system is not None:
            raise ConfigError(f"{partner.name} has no chat template, so --system has no place")
        say(f"{partner.name} does not know conversations: it continues the text that you give")
    say(HELP)
    beginning: list[ChatTurn] = [{"role": "system", "content": system}] if system else []
    turns = list(beginning)
    while (line := _ask()) is not None:
        if line == "/new":
            turns = list(beginning)
        elif line.startswith("/"):
            say(f"{line.split()[0]} is no command: {HELP}")
        elif line:
            turns.append({"role": "user", "content": line})
            turns = _answer(partner, turns, options)


def _ask() -> str | None:
    """A line, without its end; None to leave."""
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
    """Print the answer; the conversation with it, or without the last turn if it failed."""
    told = ""
    try:
        with closing(partner.generate(turns, options)) as pieces:
            for piece in pieces:
                told += piece
                print(piece.translate(_SHOWN), end="", flush=True)
    except KeyboardInterrupt:
        say(" (stopped)")
    except MoefitError as error:
        say(f"error: {error}")
        return turns[:-1]
    print()
    return [*turns, {"role": "assistant", "content": told}]
