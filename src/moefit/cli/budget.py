"""The commands that ask a running server for its budget, and turn it: budget get, budget set."""

from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from moefit.cli.app import ADVANCED, COMMANDS, Json, app, print_json
from moefit.cli.options import ModeName
from moefit.serve.memory.budget import PARTS, format_bytes
from moefit.server.client import Client

DEFAULT_URL = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(help="URL of the server", envvar="MOEFIT_URL")]
ApiKey = Annotated[
    str | None,
    typer.Option(help="API key of the server", envvar="MOEFIT_API_KEY", rich_help_panel=ADVANCED),
]

budget = typer.Typer(no_args_is_help=True, help=COMMANDS["budget"][1])
app.add_typer(budget, name="budget")


@budget.command(name="get", help="Show the memory estimate, its parts, and counters.")
def get_budget(url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Print the server's memory estimate."""
    _show(Client(url, api_key).get("/v1/memory"), as_json=as_json)


@budget.command(name="set", help="Change the budget while requests run.")
def set_budget(
    memory: Annotated[str, typer.Argument(help="budget, such as 3GiB, or 'all': no limit")],
    mode: Annotated[ModeName | None, typer.Option(help="as for serve")] = None,
    prefill: Annotated[ModeName | None, typer.Option(help="as for serve")] = None,
    bound: Annotated[float | None, typer.Option(min=0, max=1, help="as for serve")] = None,
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
    table.add_section()
    if memory["plan"] is not None:
        _add_prediction(table, memory["plan"])
    requests, counters = memory["requests"], memory["counters"]
    table.add_row("requests running, waiting", f"{requests['running']}, {requests['waiting']}")
    table.add_row("tokens/s", f"{memory['tokens_per_second']:.1f}")
    table.add_row("KV cache, tokens", f"{memory['kv_tokens_used']:,} of {memory['kv_tokens']:,}")
    table.add_row("experts found in memory", f"{counters['hit_rate']:.1%}")
    table.add_row("router weight moved", f"{counters['substituted_mass']:.1%}")
    table.add_row("read from storage", format_bytes(counters["bytes_read"]))
    return table


def _add_prediction(table: Table, plan: dict[str, Any]) -> None:
    table.add_row("planned", plan["words"])
    table.add_row("predicted loss", f"{plan['loss']:+.2%}, give or take {plan['margin']:.2%}")
    table.add_row("predicted tokens/s", f"{plan['tokens_per_second']:.1f}")
    table.add_section()
