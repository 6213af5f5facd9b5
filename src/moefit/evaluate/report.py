"""Tables of scores for the terminal."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from moefit.evaluate.perplexity import Score
from moefit.evaluate.stepwise import StepScore


def score_table(scores: Sequence[Score], title: str) -> Table:
    """Return a table with a row per inference rule; parameters exclude embeddings and head."""
    table = narrow_table(title)
    table.add_column("inference rule", no_wrap=True)
    for name in ("experts", "active", "share", "perplexity", "bits/byte", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for score in scores:
        table.add_row(
            score.rule,
            f"{score.mlp_experts:.2f}",
            f"{score.active_parameters / 1e6:.2f} M",
            f"{score.active_share:.0%}",
            f"{score.perplexity:.3f}",
            f"{score.bits_per_byte:.4f}",
            f"{score.tokens_per_second:,.0f}",
        )
    return table


def step_table(scores: Mapping[str, StepScore], title: str) -> Table:
    """Return a table with a row per policy: quality, substitution, bytes read and speed."""
    table = narrow_table(title)
    table.add_column("policy")
    names = ("slots", "ppl", "loss", "KL", "agree", "moved", "hits", "MB/tok", "tok/s")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in scores.items():
        table.add_row(
            name,
            f"{one.slots / one.experts:.0%}",
            f"{one.stepwise:.2f}",
            f"{one.loss:+.1%}",
            f"{one.divergence:.3f}",
            f"{one.agreement:.1%}",
            f"{one.substituted_mass:.1%}",
            f"{one.hit_rate:.0%}",
            f"{one.bytes_per_token / 1e6:.2f}",
            f"{one.tokens_per_second:.1f}",
        )
    return table


def narrow_table(title: str) -> Table:
    """Return a table without columns, with little padding: rich truncates numbers in 80 columns."""
    return Table(
        title=escape(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
