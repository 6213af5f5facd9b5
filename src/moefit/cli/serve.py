"""The command that serves a model over HTTP."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moefit.api import folder_of
from moefit.checkpoint.model_folder import refuse_without_tokenizer
from moefit.cli.app import ADVANCED, command, say, stopped
from moefit.cli.loading import load_planned, load_served, say_generation, shared_steps
from moefit.cli.options import (
    MEMORY_OPTIONS,
    MISS_OPTIONS,
    ConfigFile,
    Following,
    GenerationConfig,
    MemoryOptions,
    MissOptions,
    expand_options,
)
from moefit.cli.planned import NO_PLAN, PlanOptions, PlanProcess
from moefit.engine.api import EngineSettings
from moefit.engine.engine import Engine
from moefit.evaluate.loading import REFERENCE
from moefit.plan.plan_file import Plan
from moefit.serve.model import ServedModel
from moefit.server.middleware import ServerSettings, is_loopback
from moefit.server.run import Deadline, HttpServer, bind, url_of
from moefit.server.service import LivePlan, Service
from moefit.signals import stop_on_signal

LEAVING = 30.0  # seconds that closing everything may take, once answers have been waited for


@command("serve", context_settings={"auto_envvar_prefix": "MOEFIT"})
@expand_options
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help=f"model folder, training run, name on the Hub, or '{REFERENCE}'",
            envvar="MOEFIT_MODEL",
        ),
    ] = REFERENCE,
    config: ConfigFile = None,
    room: MemoryOptions = MEMORY_OPTIONS,
    misses: MissOptions = MISS_OPTIONS,
    planned: PlanOptions = NO_PLAN,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="key that clients must send; prefer the variable, which ps does not show"
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(
            help="the model's name in the API; MODEL if not given", rich_help_panel=ADVANCED
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            min=1, help="most tokens of one request, prompt and output", rich_help_panel=ADVANCED
        ),
    ] = None,
    max_concurrency: Annotated[
        int, typer.Option(min=1, help="requests that run at once", rich_help_panel=ADVANCED)
    ] = 16,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="requests that may wait", rich_help_panel=ADVANCED)
    ] = 1024,
    prefill_chunk: Annotated[
        int,
        typer.Option(
            min=1,
            help="most prompt tokens in one step; running requests go on between",
            rich_help_panel=ADVANCED,
        ),
    ] = 128,
    generation_config: GenerationConfig = Following.auto,
    chat_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="max_tokens of chat requests that give none", rich_help_panel=ADVANCED
        ),
    ] = 512,
    max_connections: Annotated[
        int, typer.Option(min=1, help="most connections at once", rich_help_panel=ADVANCED)
    ] = 1024,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="allow web pages of this origin (CORS); may be repeated", rich_help_panel=ADVANCED
        ),
    ] = None,
    drain_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            max=86400,
            help="on SIGTERM, seconds that running requests may take to end",
            rich_help_panel=ADVANCED,
        ),
    ] = 30.0,
) -> None:
    """Loopback only, unless --host says otherwise."""
    engine = EngineSettings(
        max_concurrency=max_concurrency,
        max_model_len=max_model_len,
        prefill_chunk=prefill_chunk,
        max_waiting=max_waiting,
    )
    server = ServerSettings(
        name=served_model_name or public_name(model),
        host=host,
        port=port,
        api_key=api_key,
        origins=tuple(cors_origin or ()),
        chat_tokens=chat_tokens,
        connections=max_connections,
        drain_seconds=drain_seconds,
    )
    server.check()
    _serve(model, (room, misses, planned), engine, server, generation_config.value)


def public_name(model: str) -> str:
    """What a model is called outside: of a folder its own name, not where it is."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _serve(
    model: str,
    asked: tuple[MemoryOptions, MissOptions, PlanOptions],
    engine_settings: EngineSettings,
    settings: ServerSettings,
    following: str,
) -> None:
    with bind(settings.host, settings.port) as bound:  # what can't be is refused before loading
        say(f"loading {model}")
        refuse_without_tokenizer(folder_of(model))
        served, plan = _loaded(model, asked, engine_settings, following)
        say_generation(served.generation)
        deadline = Deadline(LEAVING)
        with ExitStack() as closing:  # what is entered last is closed first
            closing.callback(deadline.cancel)
            closing.enter_context(served)
            _ = served.tokenizer  # raises for one that is damaged: clients send texts
            engine = Engine(served, engine_settings)
            service = Service(engine, settings)
            closing.callback(service.close, wait=True)
            if plan is not None:
                again = replanner(model, plan, engine)
                service.live_plan = LivePlan(engine, plan, again)
            running = HttpServer(service, bound)
            closing.callback(running.stop)
            closing.callback(engine.close, timeout=LEAVING / 3)
            closing.callback(deadline.start)
            engine.start()
            _run(running, engine, settings, url_of(bound, settings.host))


def _run(running: HttpServer, engine: Engine, settings: ServerSettings, url: str) -> None:
    """Serve until a signal says to stop, or nothing can be served any more."""
    try:
        with stop_on_signal() as request:
            running.start()
            _announce(engine, settings, url)
            running.wait(lambda: request.received is not None or engine.failure is not None)
            if request.received is not None:
                _drain(running, settings, request.received.name)
                return
    except KeyboardInterrupt:  # a second signal
        running.stop(at_once=True)
        raise stopped("SIGINT") from None
    why = "the engine failed" if engine.failure is not None else "the HTTP server ended"
    say(f"error: {why} and cannot go on; the log above says why")
    raise typer.Exit(1)


def _loaded(
    model: str,
    asked: tuple[MemoryOptions, MissOptions, PlanOptions],
    settings: EngineSettings,
    following: str,
) -> tuple[ServedModel, Plan | None]:
    """With room for the logits of requests that run together."""
    how = {**shared_steps(settings.max_concurrency), "generation_config": following}
    if asked[2].wanted:
        return load_planned(model, *asked, **how)
    return load_served(model, *asked, **how), None


def replanner(model: str, plan: Plan, engine: Engine) -> Callable[[int], Plan]:
    """Makes a plan as this one for another budget of the model as it is loaded."""
    order = PlanProcess(
        model=model,
        memory=0,
        context=plan.context,
        device=str(engine.served.model.device),
        process=engine.served.budget.process,
        target=plan.target,
        concurrency=engine.settings.max_concurrency,
        dtype=plan.dtype,
        rest=plan.configuration.dense_precision,
    )
    return lambda memory: replace(order, memory=memory).carry_out()


def _drain(running: HttpServer, settings: ServerSettings, signal: str) -> None:
    say(f"{signal}: finishing what runs; again to stop at once")
    if not running.drain():
        say(f"not all ended within {settings.drain_seconds:g} s; giving them up")


def _announce(engine: Engine, settings: ServerSettings, url: str) -> None:
    limits = engine.settings
    say(
        f"serving {settings.name!r}: {limits.max_concurrency} requests at once, "
        f"{engine.max_model_len:,} tokens each at most, {engine.stats().kv_tokens:,} together"
    )
    key = "with the key" if settings.api_key else "no key"
    say(f"API at {url}/v1 ({key}), page at {url}/, metrics at {url}/metrics")
    if settings.api_key is None and not is_loopback(settings.host):
        say(
            f"note: whoever reaches {settings.host} can use this server and change its budget; "
            "give --api-key"
        )
