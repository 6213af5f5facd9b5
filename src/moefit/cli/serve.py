"""The command `serve`: a model over HTTP."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import count
from pathlib import Path
from socket import socket
from time import monotonic
from typing import Annotated, Any

import typer

from moefit.api import folder_of
from moefit.checkpoint.tokenizer import refuse_without_tokenizer
from moefit.cli.app import advanced, command, option, say, stopped
from moefit.cli.loading import (
    draft_memory,
    load_planned,
    load_served,
    say_generation,
    shared_steps,
)
from moefit.cli.options import (
    SERVING,
    ConfigFile,
    Following,
    GenerationConfig,
    ServingOptions,
    SpeculateOption,
    expand_options,
)
from moefit.cli.planned import PlanProcess
from moefit.device import planned_device
from moefit.engine.api import EngineSettings
from moefit.engine.engine import Engine
from moefit.engine.prefix.disk import BUFFERS_BYTES
from moefit.engine.speculation.drafts import Speculate
from moefit.errors import BudgetTooSmallError, ConfigError, UnreachedTargetError
from moefit.evaluate.loading import REFERENCE
from moefit.host import available_bytes, is_loopback, process_bytes, total_bytes
from moefit.plan.plan_file import Plan
from moefit.quant.kv_int8 import INT8_CACHE, MODEL_CACHE
from moefit.serve.memory.budget import format_bytes, parse_bytes
from moefit.serve.memory.follow import (
    AUTO_MEMORY,
    RESERVE,
    BudgetFollower,
    BudgetRule,
    default_headroom,
)
from moefit.serve.model import ServedModel
from moefit.serve.outgrown import Backlog, size_line, slow_line, subject_of, unfit_line
from moefit.serve.prediction.usage import kept_usage
from moefit.server.middleware import ServerSettings
from moefit.server.operation.handover import inherited_socket, notify_supervisor
from moefit.server.operation.json_log import log_json
from moefit.server.operation.keys import readable_by_others
from moefit.server.operation.traces import traces_to
from moefit.server.run import HttpServer, bind, exit_timer, url_of
from moefit.server.service import LivePlan, Service
from moefit.signals import HangUp, note_hangups, stop_on_signal


class PrefixCacheName(StrEnum):
    """Whether keys and values of earlier prompts are reused."""

    on = "on"
    off = "off"


LEAVING = 30.0  # seconds that closing may take after running requests have ended


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowSettings:
    """How the budget may follow free memory.

    Args:
        follows: Whether it does from the start.
        least: Smallest budget; None for the minimum of the model.
        most: Largest budget; None for all experts. One that is larger leaves room for a KV cache
            that grows.
        headroom: Bytes that stay free.
    """

    follows: bool
    least: int | None
    most: int | None
    headroom: int

    def first_budget(self) -> int:
        """Return the budget to load the model with."""
        room = process_bytes() + available_bytes() - self.headroom
        room -= room // RESERVE  # as every later budget
        return max(self.least or 1, min(room, self.most or room))

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Add to the error of a budget that is too small where it comes from."""
        try:
            yield
        except BudgetTooSmallError as error:
            if not self.follows:
                raise
            raise BudgetTooSmallError(
                f"--memory auto: {format_bytes(available_bytes())} are free, of which "
                f"{format_bytes(self.headroom)} stay free for others (--memory-headroom); {error}"
            ) from error

    def follower(self, service: Service) -> BudgetFollower:
        """Return what changes the budget of a running server."""
        engine, served = service.engine, service.engine.served

        def budget() -> int:
            total = served.budget.total
            rule.least, rule.most = self._bounds(engine)  # a KV cache may have grown
            return served.budget.max_bytes if total is None else total

        def apply(size: int) -> None:
            engine.set_memory(size)
            service.telemetry.changed("ok")
            service.history.changed(f"to {format_bytes(size)}, following free memory")

        least, most = self._bounds(engine)
        rule = BudgetRule(least=least, most=most, headroom=self.headroom)
        return BudgetFollower(rule, budget, apply, announce=say)

    def _bounds(self, engine: Engine) -> tuple[int, int]:
        """Return the smallest and the largest budget, with the KV cache of running requests."""
        least = max(engine.least_memory(), self.least or 0)
        return least, max(least, self.most or engine.served.budget.max_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """Options of the engine and the HTTP server, named as in `EngineSettings`, `ServerSettings`."""

    host: Annotated[str, option("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, option("Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000
    api_key: Annotated[
        str | None,
        option("Key that clients must send; prefer the variable, which ps does not show."),
    ] = None
    keys_file: Annotated[
        Path | None,
        advanced(
            "YAML file with further keys, their names and limits; read again when it changes, and "
            "on SIGHUP.",
            dir_okay=False,
        ),
    ] = None
    served_model_name: Annotated[
        str | None, advanced("Name of the model in the API. Default: MODEL.")
    ] = None
    max_model_len: Annotated[
        int | None, advanced("Maximum tokens of one request, prompt and output.", min=1)
    ] = None
    context_max: Annotated[
        int | None,
        advanced(
            "Maximum tokens of the KV cache, which grows beyond --context while requests need it, "
            "in memory of experts. Default: as far as those keep half of theirs.",
            min=1,
        ),
    ] = None
    max_concurrency: Annotated[
        int, advanced("Maximum number of requests that run at once.", min=1)
    ] = 16
    max_waiting: Annotated[int, advanced("Maximum number of requests that wait.", min=1)] = 1024
    prefill_chunk: Annotated[
        int, advanced("Maximum prompt tokens per step, between steps of running requests.", min=1)
    ] = 128
    deterministic: Annotated[
        bool,
        advanced(
            "Let no answer depend on other requests: where they would change each other's last "
            "bits, compute them one by one.",
            "--deterministic",
        ),
    ] = False
    prefix_cache: Annotated[
        PrefixCacheName | None,
        advanced(
            "Reuse keys and values of earlier prompts and answers. Default: on where answers are "
            "the same bits as without."
        ),
    ] = None
    prefix_cache_dir: Annotated[
        Path | None,
        advanced("Folder in which keys and values of prompts survive a restart.", file_okay=False),
    ] = None
    prefix_cache_disk: Annotated[
        str | None, advanced("Maximum size of that folder. Default: 8GiB.")
    ] = None
    speculate: SpeculateOption = "off"
    warm_start: Annotated[
        bool | None,
        advanced(
            "With --memory: keep how often each expert was used, and begin with those that earlier "
            "runs used most. Default: in mode exact, whose answers do not depend on it.",
            "--warm-start/--no-warm-start",
        ),
    ] = None
    memory_min: Annotated[
        str | None,
        advanced("Minimum of a budget that follows free memory."),
    ] = None
    memory_max: Annotated[
        str | None,
        advanced("Maximum of a budget that follows free memory."),
    ] = None
    memory_headroom: Annotated[
        str | None,
        advanced(
            "While the budget follows free memory: what stays free for other processes. Default: "
            "a 16th of all memory, at least 512MiB."
        ),
    ] = None
    chat_tokens: Annotated[
        int, advanced("Default max_tokens of chat completion requests.", min=1)
    ] = 512
    tool_parser: Annotated[
        str,
        advanced("Form in which the model calls tools; auto looks at its chat template."),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        advanced("Markers of the model's reasoning; auto looks at its chat template."),
    ] = "auto"
    max_connections: Annotated[int, advanced("Maximum number of connections.", min=1)] = 1024
    cors_origin: Annotated[
        list[str] | None, advanced("Allow web pages of this origin (CORS); may be repeated.")
    ] = None
    otlp_traces_endpoint: Annotated[
        str | None,
        advanced(
            "Send OpenTelemetry traces of requests to this URL (moefit[otel]), such as "
            "http://127.0.0.1:4318/v1/traces."
        ),
    ] = None
    log_json: Annotated[
        bool,
        advanced(
            "Write logs as JSON, one object a line, with a line for each request.", "--log-json"
        ),
    ] = False
    drain_seconds: Annotated[
        float,
        advanced("Seconds that running requests may take to end on SIGTERM.", min=0, max=86400),
    ] = 30.0

    def engine(self) -> EngineSettings:
        """Return the settings of the engine. Raises ConfigError for files that are not used."""
        folder, size = self.prefix_cache_dir, self.prefix_cache_disk
        if size is not None and folder is None:
            raise ConfigError(
                f"--prefix-cache-disk {size} is the size of a folder; give --prefix-cache-dir too"
            )
        if folder is not None and self.prefix_cache is PrefixCacheName.off:
            raise ConfigError(
                f"--prefix-cache-dir {folder} has no effect with --prefix-cache off; leave one out"
            )
        if folder == Path():
            raise ConfigError(
                "--prefix-cache-dir is empty or the working folder; name a folder for prefixes, "
                "such as ~/.cache/moefit/prefixes"
            )
        return EngineSettings(
            max_concurrency=self.max_concurrency,
            max_model_len=self.max_model_len,
            context_max=self.context_max,
            prefill_chunk=self.prefill_chunk,
            max_waiting=self.max_waiting,
            deterministic=self.deterministic,
            prefix_cache="auto" if self.prefix_cache is None else self.prefix_cache.value,
            prefix_folder=None if folder is None else folder.expanduser(),
            prefix_disk_bytes=parse_bytes(size or "8GiB"),
            speculate=Speculate.parse(self.speculate).setting,
        )

    def follow(self, options: ServingOptions) -> FollowSettings:
        """Return how the budget may follow free memory. Raises ConfigError for invalid sizes."""
        least, most = (
            None if one is None else parse_bytes(one) for one in (self.memory_min, self.memory_max)
        )
        if least is not None and most is not None and least > most:
            raise ConfigError(
                f"--memory-min {self.memory_min} is larger than --memory-max {self.memory_max}"
            )
        follows, headroom = options.memory == AUTO_MEMORY, self.memory_headroom
        on_cpu = planned_device(options.device).type == "cpu"
        if (follows or headroom or least or most) and (options.has_plan or not on_cpu):
            raise ConfigError(
                "--memory auto and its limits (--memory-min, --memory-max, --memory-headroom) are "
                "for models on a CPU and without a plan; give a size, such as --memory 4GiB"
            )
        if headroom is None:
            free = default_headroom()
        else:
            free = 0 if headroom.strip() == "0" else parse_bytes(headroom)
        return FollowSettings(follows=follows, least=least, most=most, headroom=free)

    def server(self, model: str) -> ServerSettings:
        """Return the settings of the HTTP server. Raises ConfigError for invalid keys."""
        server = ServerSettings(
            name=self.served_model_name or public_name(model),
            host=self.host,
            port=self.port,
            api_key=self.api_key,
            keys_file=None if self.keys_file is None else self.keys_file.expanduser(),
            origins=tuple(self.cors_origin or ()),
            chat_tokens=self.chat_tokens,
            tool_parser=self.tool_parser,
            reasoning_parser=self.reasoning_parser,
            connections=self.max_connections,
            drain_seconds=self.drain_seconds,
            traces_endpoint=self.otlp_traces_endpoint,
        )
        server.check()
        return server


@command("serve", context_settings={"auto_envvar_prefix": "MOEFIT"})
@expand_options
def serve(
    model: Annotated[
        str,
        typer.Argument(
            help=f"Model folder, training run, name on the Hub, or '{REFERENCE}'.",
            envvar="MOEFIT_MODEL",
        ),
    ] = REFERENCE,
    config: ConfigFile = None,
    options: ServingOptions = SERVING,
    server: ServerOptions = ServerOptions(),
    generation_config: GenerationConfig = Following.auto,
) -> None:
    """Listen on loopback only, unless --host says otherwise."""
    if server.log_json:
        log_json()
    follow = server.follow(options)
    if follow.follows:
        first = follow.first_budget()
        say(f"--memory auto: beginning with {format_bytes(first)}")
        options = replace(options, memory=str(first))
    _serve(
        model,
        options,
        server.engine(),
        server.server(model),
        follow,
        {
            "generation_config": generation_config.value,
            **draft_memory(Speculate.parse(server.speculate), options.context),
        },
        server.warm_start,
    )


def public_name(model: str) -> str:
    """Return the name of a model for clients: of a folder its name, not its path."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def _serve(
    model: str,
    options: ServingOptions,
    engine_settings: EngineSettings,
    settings: ServerSettings,
    follow: FollowSettings,
    loading: Mapping[str, Any],
    warm_start: bool | None,
) -> None:
    began, endpoint = monotonic(), settings.traces_endpoint
    traces = None if endpoint is None else traces_to(endpoint, settings.name)
    inherited = inherited_socket(os.environ)
    # Fails before loading if the port is taken.
    with (
        _hangups(settings, inherited) as hangup,
        inherited or bind(settings.host, settings.port) as bound,
    ):
        if inherited is not None:
            host, port = inherited.getsockname()[:2]
            settings = replace(settings, host=host, port=port)
            say(f"listening on {host} port {port}, a socket that the next server takes over")
        say(f"loading {model}")
        refuse_without_tokenizer(folder_of(model))
        with follow.explained(), _beyond_explained(model):
            served, plan = _loaded(model, options, engine_settings, loading)
        say_generation(served.generation)
        deadline = exit_timer(LEAVING)
        with ExitStack() as closing:  # what is entered last is closed first
            closing.callback(deadline.cancel)
            closing.enter_context(served)
            warm = _starts_warm(served, warm_start)
            if warm and (remark := closing.enter_context(kept_usage(served))):
                say(remark)
            _ = served.tokenizer  # raises for one that is damaged: clients send texts
            engine = Engine(served, engine_settings)
            service = Service(engine, settings)
            closing.callback(service.close, wait=True)
            if traces is not None:
                service.traces = traces
                closing.callback(traces.close)
            if plan is not None:
                again = replanner(model, plan, engine)
                service.live_plan = LivePlan(engine, plan, again)
            elif served.model.device.type == "cpu":
                service.follower = follow.follower(service)
                closing.callback(service.follower.close)
            running = HttpServer(service, bound, inherited=inherited is not None)
            closing.callback(running.stop)
            closing.callback(engine.close, timeout=LEAVING / 3)
            closing.callback(deadline.start)
            url = url_of(bound, settings.host)
            engine.start()
            if follow.follows and service.follower is not None:
                service.follower.resume()
            subject = subject_of(model, folder_of(model))
            backlog = Backlog(subject)
            if line := size_line(subject, served.budget.all_resident_bytes, total_bytes()):
                say(line)
            _run(
                running,
                engine,
                lambda: _announce(service, url, monotonic() - began),
                lambda: _each_second(service, backlog, hangup),
            )


def _hangups(
    settings: ServerSettings, inherited: socket | None
) -> AbstractContextManager[HangUp | None]:
    """Note SIGHUP where it may mean to read a file again, rather than that a terminal is gone."""
    supervised = inherited is not None or "NOTIFY_SOCKET" in os.environ
    return note_hangups() if supervised or settings.keys_file else nullcontext()


@contextmanager
def _beyond_explained(model: str) -> Iterator[None]:
    """Say how vLLM would serve a model that is too large or too slow for this machine."""
    try:
        yield
    except BudgetTooSmallError:
        if line := unfit_line(subject_of(model, folder_of(model)), total_bytes()):
            say(line)
        raise
    except UnreachedTargetError:
        say(slow_line(subject_of(model, folder_of(model))))
        raise


def _starts_warm(served: ServedModel, warm_start: bool | None) -> bool:
    """Return whether residents begin as earlier runs used them.

    Where modes substitute absent experts, answers would depend on the texts of earlier runs.
    """
    if served.budget.total is None:
        if warm_start:
            say("note: --warm-start has no effect: without --memory all experts are in memory")
        return False
    if warm_start is None:
        return served.policy.mode == served.policy.prefill == "exact"
    return warm_start


def _each_second(service: Service, backlog: Backlog, hangup: HangUp | None) -> None:
    """Say when requests outgrow the machine, and read the file of keys again if it has changed."""
    load = service.engine.stats()
    if line := backlog.observe(monotonic(), load.waiting, load.tokens_per_second):
        say(line)
    asked = hangup is not None and hangup.take()
    if service.keys.path is not None and (asked or service.keys.changed()):
        failures = service.keys.reloads["failed"]
        said = service.keys.reload()
        failed = service.keys.reloads["failed"] > failures
        say(said, level=logging.WARNING if failed else logging.INFO)


def _run(
    running: HttpServer,
    engine: Engine,
    announce: Callable[[], None],
    each_second: Callable[[], None],
) -> None:
    """Serve until a signal arrives, or the engine or HTTP server fails."""

    polls = count()

    def ends() -> bool:
        if next(polls) % 10 == 0:  # once a second
            each_second()
        return request.received is not None or engine.failure is not None

    try:
        with stop_on_signal() as request:
            running.start()
            announce()
            notify_supervisor(os.environ, "READY=1")
            running.wait(ends)
            if request.received is not None:
                _drain(running, request.received.name)
                return
    except KeyboardInterrupt:  # a second signal
        running.stop(at_once=True)
        raise stopped("SIGINT") from None
    why = "the engine failed" if engine.failure is not None else "the HTTP server ended"
    say(f"error: {why} and cannot go on; the log above says why")
    raise typer.Exit(1)


def _loaded(
    model: str,
    options: ServingOptions,
    settings: EngineSettings,
    loading: Mapping[str, Any],
) -> tuple[ServedModel, Plan | None]:
    """Load the model, with memory for the logits of requests that run at once.

    Args:
        model: As on the command line.
        options: Memory, precision, mode and plan.
        settings: Of the engine.
        loading: Further settings of `moefit.load`.
    """
    shared = {**shared_steps(settings.max_concurrency), "step_tokens": settings.step_tokens}
    how = {**shared, **loading, "helpers": shared["helpers"] + loading.get("helpers", 0)}
    if settings.prefix_folder is not None:
        how["helpers"] += BUFFERS_BYTES
    if options.has_plan:
        return load_planned(model, options, **how)
    return load_served(model, options, **how), None


def replanner(model: str, plan: Plan, engine: Engine) -> Callable[[int], Plan]:
    """Return a function that plans for another budget of the model as it is loaded."""
    budget = engine.served.budget
    process = PlanProcess(
        model=model,
        memory=0,
        context=plan.context,
        kv_cache=INT8_CACHE if engine.served.int8_cache else MODEL_CACHE,
        device=str(engine.served.model.device),
        process=budget.process + budget.probes + budget.draft,
        target=plan.target,
        concurrency=engine.settings.logit_rows,
        dtype=plan.dtype,
        dense_precision=plan.configuration.dense_precision,
        lengths=plan.lengths,
        step_tokens=budget.step_tokens,
    )
    return lambda memory: replace(process, memory=memory).run()


def _drain(running: HttpServer, signal: str) -> None:
    notify_supervisor(os.environ, "STOPPING=1")
    say(f"{signal}: finishing running requests; send it again to stop at once")
    if not running.drain():
        say("not all ended within --drain-seconds; cancelling the rest")


def _announce(service: Service, url: str, seconds: float) -> None:
    engine, settings = service.engine, service.settings
    limits = engine.settings
    load = engine.stats()
    grows = load.kv_tokens_most > load.kv_tokens
    more = f", {load.kv_tokens_most:,} where the KV cache grows" if grows else ""
    say(
        f"serving {settings.name!r}, ready after {seconds:.1f} s: "
        f"{limits.max_concurrency} requests at once, "
        f"{engine.max_model_len:,} tokens each at most, {load.kv_tokens:,} together{more}"
    )
    say(engine.invariance.describe())
    say(engine.prefix_coverage.describe())
    if limits.speculate != "off":
        say(engine.speculation_coverage.describe())
    if (files := engine.stats().prefix_files) is not None:
        say(
            f"prefixes survive a restart in {engine.settings.prefix_folder}: "
            f"{format_bytes(files.bytes)} of {format_bytes(files.limit)} now"
        )
    number = len(service.keys.all)
    key = ("no key", "with the key")[number] if number < 2 else f"with one of {number} keys"
    say(f"API at {url}/v1 ({key}), page at {url}/, metrics at {url}/metrics")
    if (path := settings.keys_file) is not None and readable_by_others(path):
        say(f"note: all users of this machine can read the keys in {path}; chmod 600 it")
    if not settings.keyed and not is_loopback(settings.host):
        say(
            f"note: anyone who reaches {settings.host} can use this server and change its budget; "
            "give --api-key"
        )
