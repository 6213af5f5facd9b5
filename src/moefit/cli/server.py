"""The command that serves a model over HTTP, and the one that turns a server's budget."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from moefit.cli.app import Json, app, print_json, say, stopped
from moefit.cli.config_file import ConfigFile
from moefit.cli.options import MISSES, ROOM, Misses, ModeName, Room, spread
from moefit.cli.plan_order import PlanOrder
from moefit.cli.planned import NOTHING_PLANNED, Planned
from moefit.cli.serving import load_planned, load_served, shared_steps
from moefit.engine.engine import Engine, EngineSettings
from moefit.evaluate.loading import REFERENCE
from moefit.plan.plan_file import Plan
from moefit.serve.budget import PARTS, format_bytes
from moefit.serve.served import ServedModel
from moefit.server.client import Client
from moefit.server.live_plan import LivePlan
from moefit.server.running import Running, bind, url_of
from moefit.server.security import is_loopback
from moefit.server.service import Service
from moefit.server.settings import ServerSettings
from moefit.signals import stop_on_signal

DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(help="of the server", envvar="MOEFIT_URL")]
ApiKey = Annotated[str | None, typer.Option(help="the server's key", envvar="MOEFIT_API_KEY")]


@app.command(
    help="Serve a model over HTTP: OpenAI's API, a page with the budget dial, metrics.",
    context_settings={"auto_envvar_prefix": "MOEFIT"},
)
@spread
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help=f"model folder, training run, name on the Hub, or '{REFERENCE}'",
            envvar="MOEFIT_MODEL",
        ),
    ] = REFERENCE,
    config: ConfigFile = None,
    room: Room = ROOM,
    misses: Misses = MISSES,
    planned: Planned = NOTHING_PLANNED,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(help="what clients must give; as a variable, ps does not show it"),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="the model's name in requests; that of MODEL if none")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="tokens of one request, prompt and answer")
    ] = None,
    max_concurrency: Annotated[int, typer.Option(min=1, help="requests that run at once")] = 16,
    max_waiting: Annotated[int, typer.Option(min=1, help="requests that may wait")] = 1024,
    prefill_chunk: Annotated[
        int, typer.Option(min=1, help="prompt tokens in one step, so that answers go on between")
    ] = 128,
    chat_tokens: Annotated[
        int, typer.Option(min=1, help="most tokens of a chat answer, if the request does not say")
    ] = 512,
    max_connections: Annotated[int, typer.Option(min=1, help="connections at a time")] = 1024,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="web pages of this origin may ask too; may be repeated"),
    ] = None,
    drain_seconds: Annotated[
        float,
        typer.Option(min=0, max=86400, help="on SIGTERM, how long answers may take to end"),
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
        api_key=api_key or None,
        origins=tuple(cors_origin or ()),
        chat_tokens=chat_tokens,
        connections=max_connections,
        drain_seconds=drain_seconds,
    )
    server.check()
    _serve(model, (room, misses, planned), engine, server)


def public_name(model: str) -> str:
    """What a model is called outside: of a folder its own name, not where it is."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _serve(
    model: str,
    asked: tuple[Room, Misses, Planned],
    engine_settings: EngineSettings,
    settings: ServerSettings,
) -> None:
    with bind(settings.host, settings.port) as bound:  # what can't be is refused before loading
        say(f"loading {model}")
        served, plan = _loaded(model, asked, engine_settings)
        with served:
            engine = Engine(served, engine_settings)
            service = Service(engine, settings)
            if plan is not None:
                again = replanner(model, plan, engine)
                service.live_plan = LivePlan(engine, plan, again)
            running = Running(service, bound)
            engine.start()
            try:
                with stop_on_signal() as request:
                    running.start()
                    _announce(engine, settings, url_of(bound, settings.host))
                    running.wait(lambda: request.received is not None)
                    if request.received is not None:
                        _drain(running, settings, request.received.name)
            except KeyboardInterrupt:  # a second signal
                running.stop(at_once=True)
                raise stopped("SIGINT") from None
            finally:
                engine.close()
                running.stop()


def _loaded(
    model: str, asked: tuple[Room, Misses, Planned], settings: EngineSettings
) -> tuple[ServedModel, Plan | None]:
    """With room for the logits of requests that run together."""
    logits = shared_steps(settings.max_concurrency)
    if asked[2].wanted:
        return load_planned(model, *asked, **logits)
    return load_served(model, *asked, **logits), None


def replanner(model: str, plan: Plan, engine: Engine) -> Callable[[int], Plan]:
    """Makes a plan as this one for another budget of the model as it is loaded."""
    order = PlanOrder(
        model=model,
        memory=0,
        context=plan.context,
        device=str(engine.served.model.device),
        process=engine.served.budget.process,
        promise=plan.promise,
        concurrency=engine.settings.max_concurrency,
        dtype=plan.dtype,
        rest=plan.configuration.rest,
    )
    return lambda memory: replace(order, memory=memory).carry_out()


def _drain(running: Running, settings: ServerSettings, signal: str) -> None:
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


budget = typer.Typer(no_args_is_help=True, help="The memory budget of a running server.")
app.add_typer(budget, name="budget")


@budget.command(name="get", help="Where the bytes are, and what has happened.")
def get_budget(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Ask the server for its ledger."""
    _show(Client(url, api_key).get("/v1/memory"), as_json=as_json)


@budget.command(name="set", help="Serve inside another budget from now on, while requests run.")
def set_budget(
    memory: Annotated[
        str, typer.Argument(help="such as 3GiB; 'all' for as much as the model takes")
    ],
    mode: Annotated[ModeName | None, typer.Option(help="as of serve")] = None,
    prefill: Annotated[ModeName | None, typer.Option(help="as of serve")] = None,
    bound: Annotated[float | None, typer.Option(min=0, max=1, help="as of serve")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Returns when the change is in force; one that can't be had changes nothing."""
    asked: dict[str, Any] = {"bytes": None if memory == "all" else memory}
    names: dict[str, ModeName | None] = {"mode": mode, "prefill": prefill}
    asked |= {name: value.value for name, value in names.items() if value is not None}
    if bound is not None:
        asked["bound"] = bound
    _show(Client(url, api_key).post("/v1/memory", asked), as_json=as_json)


def _all_experts(memory: dict[str, Any]) -> list[tuple[str, int]]:
    """Budgets that hold every expert: one, or one for each format that they may have."""
    kinds = memory["everything_in"].items()
    return [(f"all experts in {name}", size) for name, size in kinds] or [
        ("all experts", memory["everything"])
    ]


def _show(memory: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(memory)
    else:
        Console().print(memory_table(memory))


def memory_table(memory: dict[str, Any]) -> Table:
    """What GET /v1/memory says, for a terminal."""
    table = Table(title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.title = f"{memory['model']}, mode {memory['mode']}"
    table.add_column("memory", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    ledger = memory["budget"]
    for name, meaning in PARTS.items():
        table.add_row(meaning, format_bytes(ledger[name]))
    blocks = memory["blocks"]
    slots = sum(block["slots"] for block in blocks)
    experts = sum(block["experts"] for block in blocks)
    table.add_row(f"{slots:,} slots for {experts:,} experts", format_bytes(memory["slot_bytes"]))
    table.add_section()
    total = ledger["total"]
    table.add_row("budget", "none" if total is None else format_bytes(total))
    for meaning, size in (
        ("floor", memory["floor"]),
        *_all_experts(memory),
        ("the process now", memory["process_bytes"]),
        ("at its peak", memory["peak_process_bytes"]),
    ):
        table.add_row(meaning, format_bytes(size))
    if plan := memory.get("plan"):
        table.add_section()
        table.add_row("planned", plan["words"])
        table.add_row("predicted loss", f"{plan['loss']:+.2%}, give or take {plan['margin']:.2%}")
        table.add_row("predicted tokens/s", f"{plan['tokens_per_second']:.1f}")
    table.add_section()
    requests, counters = memory["requests"], memory["counters"]
    table.add_row("requests running, waiting", f"{requests['running']}, {requests['waiting']}")
    table.add_row("tokens/s", f"{memory['tokens_per_second']:.1f}")
    table.add_row("KV cache, tokens", f"{memory['kv_tokens_used']:,} of {memory['kv_tokens']:,}")
    table.add_row("experts found in memory", f"{counters['hit_rate']:.1%}")
    table.add_row("router weight moved", f"{counters['substituted_mass']:.1%}")
    table.add_row("read from storage", format_bytes(counters["bytes_read"]))
    return table
