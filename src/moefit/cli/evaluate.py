"""The command `eval`: perplexity and cost of a model, or its scores on tasks."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from moefit.api import folder_of
from moefit.cli.app import Json, advanced, command, console, option, print_json
from moefit.cli.loading import WHOLE_WINDOWS, is_served, load_served, loading
from moefit.cli.options import Model, ServingOptions, TextFile, expand_options, torch_dtype
from moefit.cli.precision import resolve_precision
from moefit.cli.scores.tasks import TaskChoice, evaluate_tasks
from moefit.engine.runners import start_token
from moefit.errors import ConfigError
from moefit.evaluate.baselines import fix_residents, native_reference
from moefit.evaluate.evaluated_model import evaluated_model
from moefit.evaluate.kernel_experts import use_kernels
from moefit.evaluate.loading import REFERENCE, load_full_model
from moefit.evaluate.passage import read_pairs, read_text
from moefit.evaluate.perplexity import Text, score
from moefit.evaluate.report import score_table, step_table
from moefit.evaluate.stepwise import score_steps
from moefit.moe.routing import Rule
from moefit.serve.config import NATIVE_PRECISION, LoadSettings
from moefit.serve.hf.generation_config import IGNORE
from moefit.serve.layer.router_probe import use_rule
from moefit.serve.model import ServedModel
from moefit.serve.windows import Windows

_OPTIONS = ServingOptions()
_WINDOW = 256  # tokens of a text
_TASK_CONTEXT = 1024  # tokens of the longest question, if the model is served


class BaselineName(StrEnum):
    """Fixed resident sets to compare with."""

    norm = "norm"
    frequency = "frequency"
    importance = "importance"
    random = "random"


@command("eval")
@expand_options
def evaluate(
    model: Model = REFERENCE,
    text: TextFile = None,
    rule: Annotated[
        list[str] | None,
        option("dense, top_k:K, threshold:EPS or threshold_top_k:EPS; may be repeated."),
    ] = None,
    tasks: Annotated[
        str | None,
        option("Score on lm-evaluation-harness's tasks: hellaswag,piqa,winogrande,sciq,..."),
    ] = None,
    max_tokens: Annotated[
        int | None, advanced("Number of tokens to predict, spread over the text.", min=2)
    ] = None,
    task_data: Annotated[
        Path | None,
        advanced("With --tasks: folder of TASK.jsonl. Default: download from the Hub."),
    ] = None,
    limit: Annotated[
        int | None, advanced("With --tasks: most questions of a task, its first ones.", min=1)
    ] = None,
    few_shot: Annotated[
        int | None, advanced("With --tasks: solved questions before each one.", min=0)
    ] = None,
    batch_size: Annotated[
        int | None, advanced("With --tasks: most sequences read together. Default: 8.", min=1)
    ] = None,
    out: Annotated[
        Path | None,
        advanced("With --tasks: folder to keep answers and results in, and to continue from."),
    ] = None,
    context: Annotated[
        int | None,
        option(
            f"Tokens of a window. Default: {_WINDOW}; with --tasks, of the longest question: "
            f"{_TASK_CONTEXT} in a budget, else the model's own.",
            min=1,
        ),
    ] = None,
    options: ServingOptions = _OPTIONS,
    baseline: Annotated[
        BaselineName | None, advanced("Fixed resident set to compare with.")
    ] = None,
    residency: Annotated[
        str | None,
        advanced("manager, or fixed: keep the resident set, so that runs repeat."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Score all rules on the same windows; served models step by step against all experts."""
    rules = [Rule.parse(one) for one in rule or []]
    if tasks is not None:
        _refuse_with_tasks(text=text, max_tokens=max_tokens, baseline=baseline, residency=residency)
        choice = TaskChoice(
            names=tasks,
            data=task_data,
            limit=limit,
            few_shot=few_shot,
            batch_size=batch_size or 8,
            context=context,
            out=out,
            as_json=as_json,
        )
        longest = _TASK_CONTEXT if context is None else context
        evaluate_tasks(model, rules, replace(options, context=longest), choice)
        return
    options = replace(options, context=_WINDOW if context is None else context)
    _refuse_without_tasks(
        task_data=task_data, limit=limit, few_shot=few_shot, batch_size=batch_size, out=out
    )
    asked = _Asked(model, text, rules, max_tokens, as_json)
    if baseline or is_served(model, options):
        _evaluate_served(asked, options, baseline, residency)
    else:
        _evaluate_whole(asked, options)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A model and the text that it is scored on, as on the command line."""

    model: str
    text: Path | None
    rules: list[Rule]
    max_tokens: int | None
    as_json: bool


def _evaluate_whole(asked: _Asked, options: ServingOptions) -> None:
    loaded, tokenizer = load_full_model(
        str(folder_of(asked.model)), device=options.device, dtype=torch_dtype(options.dtype)
    )
    use_kernels(loaded)
    passage = read_text(asked.text, tokenizer, options.context, asked.max_tokens)
    title = f"{asked.model} on {asked.text or 'the held-out standard library'}"
    _score_rules(loaded, passage, asked.rules, title, as_json=asked.as_json)


def _evaluate_served(
    asked: _Asked, options: ServingOptions, baseline: BaselineName | None, residency: str | None
) -> None:
    model = asked.model
    if baseline is None:
        options = resolve_precision(model, options, prompt_logits=WHOLE_WINDOWS)
    else:  # compares resident sets of the checkpoint's own experts
        options = replace(options, precision=options.experts)
    only, how = _only(asked.rules), {"prompt_logits": WHOLE_WINDOWS, "generation_config": IGNORE}
    with ExitStack() as stack:
        served = stack.enter_context(load_served(model, options, **how))
        if only is not None:
            use_rule(served.model, only)
        passage = _passage(served, asked.text, options.context, asked.max_tokens or 2048)
        reference = _reference(served, options)
        if reference.model is not None:
            full = stack.enter_context(reference.model)
            if only is not None:
                use_rule(full.model, only)
        name = _fix(served, passage, baseline, residency)
        _score_served(served, passage, name, reference, as_json=asked.as_json)


def _refuse_with_tasks(**options: object) -> None:
    """Raise ConfigError for options that score a text."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for scoring a text, and --tasks scores questions; "
                "give one of them"
            )


def _refuse_without_tasks(**options: object) -> None:
    """Raise ConfigError for options of tasks."""
    for name, value in options.items():
        if value is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for --tasks; name some, such as --tasks "
                "hellaswag,piqa, or leave it out"
            )


def _passage(
    served: ServedModel, text: Path | None, context: int, max_tokens: int
) -> Text | Windows:
    """Return the text, or the pairs that an encoder-decoder is scored on."""
    if not served.model.config.is_encoder_decoder:
        return read_text(text, served.tokenizer, context, max_tokens)
    start = start_token(served.model)
    return read_pairs(text, served.tokenizer, start, context, max_tokens)


def _only(rules: list[Rule]) -> Rule | None:
    """Return the rule that is given, or None. Raises ConfigError for more than one."""
    if len(rules) > 1:
        raise ConfigError(
            f"a served model has one inference rule, and --rule was given {len(rules)} times; give "
            "one, or leave out --memory, --mode, --precision and the like to compare rules"
        )
    return rules[0] if rules else None


def _score_rules(model: Any, text: Text, rules: list[Rule], title: str, *, as_json: bool) -> None:
    rules = rules or list(evaluated_model(model).default_rules())
    with console.status("scoring") as status:

        def show(name: str, done: int, total: int) -> None:
            status.update(f"{name}: {done:,} of {total:,} tokens")

        scores = score(model, text, rules, show)
    if as_json:
        print_json([one.as_dict() for one in scores])
    else:
        Console().print(score_table(scores, title))


@dataclass(frozen=True, slots=True)
class _Reference:
    """What a served model is compared with: another one, or itself with all experts."""

    model: ServedModel | None
    precision: str
    words: str


def _reference(served: ServedModel, options: ServingOptions) -> _Reference:
    """Return the model in the checkpoint's own precision, if it fits too."""
    if options.is_native and not options.has_plan:
        return _Reference(None, NATIVE_PRECISION, "all experts")
    with loading():
        native = native_reference(served, LoadSettings(**options.load_settings()))
    if native is not None:
        return _Reference(native, NATIVE_PRECISION, "all experts in native precision")
    precision = "the plan's formats" if options.has_plan else options.experts
    words = f"itself, all experts in {precision} (native precision does not fit beside it)"
    return _Reference(None, precision, words)


def _fix(
    served: ServedModel,
    text: Text | Windows,
    baseline: BaselineName | None,
    residency: str | None,
) -> str:
    """Fix the resident set if that is requested; return the name of what is scored."""
    if baseline is not None:
        if isinstance(text, Text):
            calibration = Windows(text.ids_T[None, -min(2048, len(text.ids_T)) :])
        else:
            calibration = text
        fix_residents(served, baseline.value, calibration=calibration)
        return f"fixed by {baseline}"
    if residency not in (None, served.policy.residency):
        served.set_mode(served.policy.mode, prefill=served.policy.prefill, residency=residency)
    return served.policy.mode


def _score_served(
    served: ServedModel, text: Text | Windows, name: str, reference: _Reference, *, as_json: bool
) -> None:
    with console.status("scoring") as status:

        def show(done: int, total: int) -> None:
            status.update(f"{name}: {done:,} of {total:,} tokens")

        result = score_steps(served, text, reference=reference.model, progress=show)
    if as_json:
        print_json({"name": name, "against": reference.precision, **result.as_dict()})
        return
    title = (
        f"step by step over {result.tokens:,} tokens, against {reference.words}: perplexity "
        f"{result.full:.3f}"
    )
    Console().print(step_table({name: result}, title))
