"""A model card as a table for people.

Owns wording, units and rounding. Computes nothing that `card.py` does not.
"""

from collections.abc import Iterator

from rich.table import Table

from moefit.dsmoe.card import ModelCard
from moefit.moe.routing import Rule, default_rules

_PARTS = {
    "embeddings": "embeddings",
    "head": "head",
    "attention": "attention projections",
    "attention_routers": "attention routers",
    "mlp_experts": "MLP experts",
    "mlp_routers": "MLP routers",
    "norms": "norms",
}


def card_rows(card: ModelCard, *, dtype: str = "bfloat16") -> Iterator[tuple[str, str]]:
    """(what, how much), top to bottom. Raises ConfigError if the dtype is unknown."""
    for part, count in card.parameters.as_dict().items():
        tied = part == "head" and count == 0
        yield _PARTS[part], "tied to the embeddings" if tied else _count(count)
    yield "total", _count(card.total)
    yield "total without embeddings", _count(card.total_without_embeddings)
    for rule in _rules(card):
        yield f"active, {rule}", _active(card, rule)
    yield f"weights in {dtype}", _bytes(card.weight_bytes(dtype))
    yield f"KV cache in {dtype}", f"{_bytes(card.kv_bytes_per_token(dtype))} a token"
    for rule in _rules(card):
        if rule.k is not None or rule.kind == "dense":
            forward = card.forward_flops_per_token(rule, context=(card.max_positions + 1) / 2)
            yield f"forward, {rule}", f"{forward / 1e9:,.3f} GFLOPs a token"
    flops = card.training_flops_per_token(card.max_positions)
    yield f"training at length {card.max_positions}", f"{flops / 1e9:,.3f} GFLOPs a token"


def card_table(card: ModelCard, title: str = "", *, dtype: str = "bfloat16") -> Table:
    """`card_rows` for the terminal; active parameters are counted without embeddings."""
    table = Table(title=title or None, show_header=False)
    table.add_column("what")
    table.add_column("how much", justify="right")
    for what, how_much in card_rows(card, dtype=dtype):
        if what in ("total", "active, dense", f"weights in {dtype}", "forward, dense"):
            table.add_section()
        table.add_row(what, how_much)
    return table


def _rules(card: ModelCard) -> list[Rule]:
    """The model's own rules and a ladder to compare them with."""
    rules = (*default_rules(card.num_experts), card.training_rule, card.inference_rule)
    return list(dict.fromkeys(rules))


def _active(card: ModelCard, rule: Rule) -> str:
    fewest, most = card.active_range(rule)
    if fewest == most:
        return _count(fewest)
    return f"{_count(fewest)} to {_count(most)}, by the text"


def _count(count: int) -> str:
    if count == 0:
        return "none"
    if count < 1e6:
        return f"{count / 1e3:,.1f}K"
    return f"{count / 1e6:,.{2 if count < 100 * 1e6 else 1}f}M"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
