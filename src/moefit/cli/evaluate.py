"""The command that says what a model is worth: eval."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from moefit.api import folder_of
from moefit.cli.app import ADVANCED, Json, Model, command, console, print_json
from moefit.cli.loading import WHOLE_WINDOWS, is_served, load_served, loading
from moefit.cli.options import MISS_OPTIONS, MemoryOptions, MissOptions, expand_options
from moefit.cli.planned import NO_PLAN, PlanOptions
from moefit.cli.precision import resolve_precision
from moefit.errors import ConfigError
from moefit.evaluate.baselines import fix_residents, native_reference
from moefit.evaluate.evaluated_model import evaluated_model
from moefit.evaluate.loading import REFERENCE, load_full_model
from moefit.evaluate.passage import held_out_text, text_of_file
from moefit.evaluate.perplexity import Text, score
from moefit.evaluate.report import score_table, step_table
from moefit.evaluate.stepwise import score_steps
from moefit.moe.routing import Rule
from moefit.serve.config import NATIVE_PRECISION, LoadSettings
from moefit.serve.hf.generation_config import IGNORE
from moefit.serve.layer.router_probe import use_rule
from moefit.serve.model import ServedModel

_WINDOW = MemoryOptions(context=256)


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
    text: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text file; the held-out standard library if not given"),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="dense, top_k:K, threshold:EPS, threshold_top_k:EPS; may be repeated"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="number of tokens to predict, spread over the text")
    ] = None,
    room: MemoryOptions = _WINDOW,
    misses: MissOptions = MISS_OPTIONS,
    planned: PlanOptions = NO_PLAN,
    baseline: Annotated[
        BaselineName | None,
        typer.Option(help="fixed resident set to compare with", rich_help_panel=ADVANCED),
    ] = None,
    residency: Annotated[
        str,
        typer.Option(
            help="fixed: keep the resident set as it is, so that runs repeat",
            rich_help_panel=ADVANCED,
        ),
    ] = "manager",
    as_json: Json = False,
) -> None:
    """Every rule on the same windows; in a budget or mode, step by step against all experts."""
    rules = [Rule.parse(one) for one in rule or []]
    if not (baseline or is_served(model, room, misses, planned)):
        loaded, tokenizer = load_full_model(
            str(folder_of(model)), device=room.device, dtype=room.settings()["dtype"]
        )
        passage = _passage(text, tokenizer, room.context, max_tokens)
        title = f"{model} on {text or 'the held-out standard library'}"
        _score_rules(loaded, passage, rules, title, as_json=as_json)
        return
    if baseline is None:
        room = resolve_precision(model, room, misses, planned, prompt_logits=WHOLE_WINDOWS)
    else:  # compares resident sets of the checkpoint's own experts
        room = replace(room, precision=room.experts)
    only = _only(rules)
    with ExitStack() as stack:
        served = stack.enter_context(
            load_served(
                model,
                room,
                misses,
                planned,
                prompt_logits=WHOLE_WINDOWS,
                generation_config=IGNORE,
            )
        )
        if only is not None:
            use_rule(served.model, only)
        passage = _passage(text, served.tokenizer, room.context, max_tokens or 2048)
        reference = _reference(served, room, planned)
        if reference.model is not None:
            full = stack.enter_context(reference.model)
            if only is not None:
                use_rule(full.model, only)
        name = _fix(served, passage, baseline, residency)
        _score_served(served, passage, name, reference, as_json=as_json)


def _only(rules: list[Rule]) -> Rule | None:
    """The rule that is given, if one is. Raises ConfigError for more."""
    if len(rules) > 1:
        raise ConfigError(
            f"a served model has one inference rule, and --rule was given {len(rules)} times; give "
            "one, or leave out --memory, --mode, --precision and the like to compare rules"
        )
    return rules[0] if rules else None


def _passage(
    text: Path | None, tokenizer: PreTrainedTokenizerBase, context: int, max_tokens: int | None
) -> Text:
    source = held_out_text if text is None else lambda *rest: text_of_file(text, *rest)
    return source(tokenizer, context, max_tokens)


def _score_rules(model: Any, text: Text, rules: list[Rule], title: str, *, as_json: bool) -> None:
    rules = rules or list(evaluated_model(model).default_rules())
    with console.status("scoring") as status:

        def tell(name: str, done: int, total: int) -> None:
            status.update(f"{name}: {done:,} of {total:,} tokens")

        scores = score(model, text, rules, tell)
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


def _reference(served: ServedModel, room: MemoryOptions, planned: PlanOptions) -> _Reference:
    """The checkpoint's own precision, where there is room for it too."""
    if room.is_native and not planned.wanted:
        return _Reference(None, NATIVE_PRECISION, "all experts")
    with loading():
        native = native_reference(served, LoadSettings(**room.settings()))
    if native is not None:
        return _Reference(native, NATIVE_PRECISION, "all experts in native precision")
    precision = "the plan's formats" if planned.wanted else room.experts
    words = f"itself, all experts in {precision} (no room beside it for native precision)"
    return _Reference(None, precision, words)


def _fix(served: ServedModel, text: Text, baseline: BaselineName | None, residency: str) -> str:
    """Fix the residents if that is asked for; says what is then scored."""
    if baseline is not None:
        calibration_T = text.ids_T[-min(2048, len(text.ids_T)) :]
        fix_residents(served, baseline.value, calibration_ids_T=calibration_T)
        return f"fixed by {baseline}"
    if residency != served.policy.residency:
        served.set_mode(served.policy.mode, prefill=served.policy.prefill, residency=residency)
    return served.policy.mode


def _score_served(
    served: ServedModel, text: Text, name: str, reference: _Reference, *, as_json: bool
) -> None:
    with console.status("scoring") as status:

        def tell(done: int, total: int) -> None:
            status.update(f"{name}: {done:,} of {total:,} tokens")

        result = score_steps(served, text, reference=reference.model, progress=tell)
    if as_json:
        print_json({"name": name, "against": reference.precision, **result.as_dict()})
        return
    title = (
        f"step by step over {result.tokens:,} tokens, against {reference.words}: perplexity "
        f"{result.full:.3f}"
    )
    Console().print(step_table({name: result}, title))
