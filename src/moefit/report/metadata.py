"""The metadata of a model card, as the Hugging Face Hub reads them."""

from collections.abc import Iterator

from huggingface_hub import EvalResult, ModelCardData

from moefit.report.facts import RunFacts

_ON_HUB = {
    "hellaswag": ("Rowan/hellaswag", "HellaSwag"),
    "piqa": ("baber/piqa", "PIQA"),
    "winogrande": ("allenai/winogrande", "WinoGrande"),
    "sciq": ("allenai/sciq", "SciQ"),
    "arc_easy": ("allenai/ai2_arc", "ARC easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC challenge"),
}
_TASK = "text-generation"


def front_matter(run: RunFacts, license: str | None = None) -> str:
    """Return the YAML block that begins a card: tags, library and results.

    Args:
        run: The run.
        license: An identifier of the Hub, such as `apache-2.0`; None leaves it out.
    """
    family = str(run.config.model_type)
    results = [*_task_results(run), *_perplexities(run)]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_TASK,
        license=license,
        tags=list(dict.fromkeys(["moe", family, "moefit"])),
        **({"model_name": run.name, "eval_results": results} if results else {}),
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _task_results(run: RunFacts) -> Iterator[EvalResult]:
    for row in run.tasks:
        for task, accuracy in row.accuracy.items():
            dataset, name = _ON_HUB.get(task, (task, task))
            yield EvalResult(
                task_type=_TASK,
                dataset_type=dataset,
                dataset_name=name,
                metric_type="accuracy",
                metric_name=f"accuracy, {row.name}",
                metric_value=round(accuracy / 100, 4),
            )


def _perplexities(run: RunFacts) -> Iterator[EvalResult]:
    for one in run.by_rule:
        yield EvalResult(
            task_type=_TASK,
            dataset_type="text",
            dataset_name="held-out text",
            metric_type="perplexity",
            metric_name=f"perplexity, {one.rule}",
            metric_value=round(one.perplexity, 4),
        )
