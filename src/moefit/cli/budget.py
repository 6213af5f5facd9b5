"""Commands for the memory budget of a running server: budget get, budget set."""

from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from moefit.cli.app import (
    BOUND,
    COMMANDS,
    ApiKey,
    Json,
    Mode,
    Prefill,
    advanced,
    app,
    option,
    print_json,
)
from moefit.serve.memory.budget import PARTS, format_bytes, part_label
from moefit.server.client import Client

DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, option("URL of the server.", envvar="MOEFIT_URL")]
Bound = Annotated[float | None, advanced(BOUND, min=0, max=1)]

budget = typer.Typer(no_args_is_help=True, help=COMMANDS["budget"][1])
app.add_typer(budget, name="budget")


@budget.command(name="get", help="Show the memory estimate, its parts, and counters.")
def get_budget(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Print the server's memory estimate."""
    _show(Client(url, api_key).get("/v1/memory"), as_json=as_json)


@budget.command(name="set", help="Change the budget while requests run. What is not given stays.")
def set_budget(
    memory: Annotated[
        str,
        typer.Argument(help="Budget, such as 3GiB; 'auto' follows free memory, 'all' is no limit."),
    ],
    mode: Mode = None,
    prefill: Prefill = None,
    bound: Bound = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Return when the change is in force; a change that is not possible changes nothing."""
    given = {"mode": mode and mode.value, "prefill": prefill and prefill.value, "bound": bound}
    body: dict[str, Any] = {"bytes": None if memory == "all" else memory}
    body |= {name: value for name, value in given.items() if value is not None}
    _show(Client(url, api_key).post("/v1/memory", body), as_json=as_json)


def _all_experts(memory: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the budgets that hold all experts: one, or one per format."""
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
    """Return the response of GET /v1/memory as a table."""
    table = Table(title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.title = f"{memory['model']}, mode {memory['mode']}"
    table.add_column("memory", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    parts = memory["budget"]
    for name in PARTS:
        label = part_label(name, memory["kv_cache_dtype"])
        table.add_row(label, format_bytes(parts[name]))
    blocks = memory["blocks"]
    slots = sum(block["slots"] for block in blocks)
    experts = sum(block["experts"] for block in blocks)
    table.add_row(f"{slots:,} slots for {experts:,} experts", format_bytes(memory["slot_bytes"]))
    table.add_section()
    total = parts["total"]
    table.add_row("budget", "none" if total is None else format_bytes(total))
    following = memory.get("following")
    if following and following["active"]:
        table.add_row("follows free memory, leaving", format_bytes(following["headroom"]))
    for meaning, size in (
        ("minimum", memory["floor"]),
        *_all_experts(memory),
        ("the process now", memory["process_bytes"]),
        ("at its peak", memory["peak_process_bytes"]),
    ):
        table.add_row(meaning, format_bytes(size))
    table.add_section()
    if memory["plan"] is not None:
        _add_prediction(table, memory["plan"])
    requests, counters = memory["requests"], memory["counters"]
    table.add_row("requests running, waiting", f"{requests['running']}, {requests['waiting']}")
    table.add_row("tokens/s", f"{memory['tokens_per_second']:.1f}")
    tokens = f"{memory['kv_tokens_used']:,} of {memory['kv_tokens']:,}"
    if (most := memory.get("kv_tokens_most", 0)) > memory["kv_tokens"]:  # older servers have none
        tokens += f", up to {most:,}"
    table.add_row("KV cache, tokens", tokens)
    table.add_row("experts found in memory", f"{counters['hit_rate']:.1%}")
    table.add_row("router weight moved", f"{counters['substituted_mass']:.1%}")
    table.add_row("read from storage", format_bytes(counters["bytes_read"]))
    return table


def _add_prediction(table: Table, plan: dict[str, Any]) -> None:
    table.add_row("planned", plan["words"])
    table.add_row("predicted loss", f"{plan['loss']:+.2%} ± {plan['margin']:.2%}")
    table.add_row("predicted tokens/s", f"{plan['tokens_per_second']:.1f}")
    table.add_section()
