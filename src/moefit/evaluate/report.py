"""Tables of scores for the terminal."""

from collections.abc import Mapping, Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from moefit.evaluate.perplexity import Score
from moefit.evaluate.prediction import CONFIDENT, PredictionReport, PredictionScore, total
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


def prediction_tables(report: PredictionReport, model: str) -> list[Table]:
    """Return tables of how well experts are predicted: one by layer, one by distance."""
    title = (
        f"{model}: prediction of the next layer's experts over {report.tokens:,} tokens, "
        f"{report.slots:,} slots for {report.experts:,} experts"
    )
    if report.probes:
        title += f", by probes fitted on {report.probes_text}"
    by_layer = _prediction_table("layer", title)
    for layer, score in (report.probes or report.layers).get(1, {}).items():
        by_layer.add_row(str(layer), *_prediction_row(score))
    by_distance = _prediction_table("all layers", "by distance, and without the state")
    by_distance.caption = (
        f"precision: of guesses with a confidence of {CONFIDENT:.0%}; missing: chosen and not in "
        "memory; found: of these among the K first, and guessed with that confidence"
    )
    for what, found in (("router", report.layers), ("probe", report.probes)):
        for ahead, layers in found.items():
            name = f"{what}, {ahead} layer{'s' * (ahead > 1)} ahead"
            by_distance.add_row(name, *_prediction_row(total(layers)))
    for name, score in report.baselines.items():
        by_distance.add_row(name, *_prediction_row(score))
    return [by_layer, by_distance]


def _prediction_table(first: str, title: str) -> Table:
    table = narrow_table(title)
    table.add_column(first, no_wrap=True)
    for name in ("recall", "2K", "precision", "missing", "found", "sure"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _prediction_row(score: PredictionScore) -> list[str]:
    return ["" if one is None else f"{one:.1%}" for one in score.as_dict().values()]
