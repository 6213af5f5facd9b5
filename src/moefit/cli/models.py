"""Commands that use models: eval, generate, describe, bench."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerBase, TextStreamer

from moefit.api import folder_of
from moefit.cli.app import Device, Dtype, Json, Model, app, console, print_json
from moefit.cli.planned import MaxLoss, MinSpeed, PlanFile, Planned
from moefit.cli.serving import (
    NATIVE_PRECISION,
    BaselineName,
    Bound,
    Context,
    HostMemory,
    Memory,
    ModeOption,
    Precision,
    Prefill,
    Rest,
    Serving,
    ledger_table,
    speed_table,
)
from moefit.dsmoe.card import model_card
from moefit.dsmoe.card_view import card_table
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.dsmoe.presets import preset_names
from moefit.errors import ConfigError, DataError
from moefit.evaluate.loading import REFERENCE, config_of, load
from moefit.evaluate.passage import held_out_text, text_of_file
from moefit.evaluate.perplexity import Text, score
from moefit.evaluate.report import score_table, step_table
from moefit.evaluate.speed import measure_bandwidth, measure_speed
from moefit.evaluate.stepwise import score_steps
from moefit.evaluate.subject import subject_of
from moefit.moe.routing import Rule
from moefit.serve.baselines import fix_residents
from moefit.serve.eviction import DEFAULT_POLICY, POLICIES
from moefit.serve.reckon import ledger
from moefit.serve.served import ServedModel
from moefit.serve.settings import LoadSettings
from moefit.serve.skeleton import build


@app.command(name="eval", help="Perplexity and cost of a model: by inference rule, or in a budget.")
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
    context: Annotated[int, typer.Option(min=1, help="tokens the model sees at once")] = 256,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="predict about this many, spread over the text")
    ] = None,
    memory: Memory = None,
    host_memory: HostMemory = None,
    mode: ModeOption = None,
    prefill: Prefill = None,
    bound: Bound = 0.3,
    precision: Precision = NATIVE_PRECISION,
    rest: Rest = NATIVE_PRECISION,
    plan: PlanFile = None,
    max_loss: MaxLoss = None,
    min_speed: MinSpeed = None,
    baseline: Annotated[
        BaselineName | None, typer.Option(help="a fixed resident set instead of a mode")
    ] = None,
    residency: Annotated[
        str, typer.Option(help="fixed: the resident set stays as it is, so that runs repeat")
    ] = "manager",
    dtype: Annotated[Dtype | None, typer.Option(help="the checkpoint's own if not given")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Every rule on the same windows; in a budget or mode, step by step against all experts."""
    serving = Serving(
        memory=memory,
        host_memory=host_memory,
        mode=mode,
        prefill=prefill,
        bound=bound,
        precision=precision,
        rest=rest,
        context=context,
        device=device,
        planned=Planned(plan=plan, max_loss=max_loss, min_speed=min_speed),
        dtype=dtype.torch if dtype else None,
    )
    rules = [Rule.parse(one) for one in rule or []]
    if serving.wanted or baseline is not None:
        with serving.load(model) as served:
            passage = _passage(text, served.tokenizer, context, max_tokens or 2048)
            _evaluate_served(served, passage, rules, baseline, residency, as_json=as_json)
        return
    loaded, tokenizer = load(model, device=device, dtype=serving.dtype)
    rules = rules or list(subject_of(loaded).default_rules())
    passage = _passage(text, tokenizer, context, max_tokens)
    with console.status("scoring") as status:

        def tell(name: str, done: int, total: int) -> None:
            status.update(f"{name}: {done:,} of {total:,} tokens")

        scores = score(loaded, passage, rules, tell)
    if as_json:
        print_json([one.as_dict() for one in scores])
    else:
        title = f"{model} on {text or 'the held-out standard library'}"
        Console().print(score_table(scores, title))


def _passage(
    text: Path | None, tokenizer: PreTrainedTokenizerBase, context: int, max_tokens: int | None
) -> Text:
    source = held_out_text if text is None else lambda *rest: text_of_file(text, *rest)
    return source(tokenizer, context, max_tokens)


def _evaluate_served(
    served: ServedModel,
    text: Text,
    rules: list[Rule],
    baseline: BaselineName | None,
    residency: str,
    *,
    as_json: bool,
) -> None:
    _use_rule(served, rules)
    if baseline is not None:
        fix_residents(
            served, baseline.value, calibration_ids_T=text.ids_T[-min(2048, len(text.ids_T)) :]
        )
    elif residency != served.policy.residency:
        served.set_mode(served.policy.mode, prefill=served.policy.prefill, residency=residency)
    name = f"fixed by {baseline}" if baseline else served.policy.mode
    with console.status("scoring") as status:

        def tell(done: int, total: int) -> None:
            status.update(f"{name}: {done:,} of {total:,} tokens")

        result = score_steps(served, text, progress=tell)
    if as_json:
        print_json({"name": name, **result.as_dict()})
        return
    title = f"step by step over {result.tokens:,} tokens; all experts: perplexity {result.full:.3f}"
    Console().print(step_table({name: result}, title))


def _use_rule(served: ServedModel, rules: list[Rule]) -> None:
    if not rules:
        return
    if len(rules) > 1 or not isinstance(served.model, DsMoeForCausalLM):
        raise ConfigError(
            "a served model has one inference rule, and only DS-MoE models can be given another; "
            f"--rule was given {len(rules)} times for a {type(served.model).__name__}"
        )
    served.model.set_inference_rule(rules[0])


@app.command(help="Continue a prompt, streaming; with --memory or --mode inside a budget.")
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="text to continue")],
    rule: Annotated[
        str | None, typer.Option(help="inference rule; the model's own if none")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    memory: Memory = None,
    host_memory: HostMemory = None,
    mode: ModeOption = None,
    prefill: Prefill = None,
    bound: Bound = 0.3,
    precision: Precision = NATIVE_PRECISION,
    rest: Rest = NATIVE_PRECISION,
    plan: PlanFile = None,
    max_loss: MaxLoss = None,
    min_speed: MinSpeed = None,
    context: Context = 2048,
    device: Device = "cpu",
) -> None:
    """Writes the continuation to standard output as it comes."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p}
    sampling["max_new_tokens"] = max_new_tokens
    torch.manual_seed(seed)
    serving = Serving(
        memory=memory,
        host_memory=host_memory,
        mode=mode,
        prefill=prefill,
        bound=bound,
        precision=precision,
        rest=rest,
        context=context,
        device=device,
        planned=Planned(plan=plan, max_loss=max_loss, min_speed=min_speed),
    )
    if serving.wanted:
        with serving.load(model) as served:
            _use_rule(served, [Rule.parse(rule)] if rule else [])
            _stream(served.model, served.tokenizer, prompt, sampling)
        return
    loaded, tokenizer = load(model, device=device)
    with nullcontext() if rule is None else subject_of(loaded).use(Rule.parse(rule)):
        _stream(loaded, tokenizer, prompt, sampling)


def _stream(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: dict[str, Any]
) -> None:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise DataError("the prompt is empty; give at least one character")
    model.generate(
        **inputs,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(
            tokenizer, skip_prompt=not _continues(model), skip_special_tokens=True
        ),
        **sampling,
    )


def _continues(model: Any) -> bool:
    """Whether the answer goes on from the prompt, so that both are shown."""
    return not model.config.is_encoder_decoder


@app.command(
    help="Parameters, bytes and FLOPs of a model; with --memory or --precision the ledger."
)
def describe(
    model: Annotated[
        str, typer.Argument(help=f"a preset, or as for eval: {', '.join(preset_names())}")
    ],
    memory: Memory = None,
    host_memory: HostMemory = None,
    precision: Precision = NATIVE_PRECISION,
    rest: Rest = NATIVE_PRECISION,
    context: Context = 2048,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Allocates no weights, so the device need not be here."""
    settings = LoadSettings(
        memory=memory,
        host_memory=host_memory,
        precision=precision,
        rest=rest,
        context=context,
        device=device,
    )
    settings.check()
    plain = (
        memory is host_memory is None and device == "cpu" and precision == rest == NATIVE_PRECISION
    )
    if plain and _is_ours(model):
        card = model_card(config_of(model))
        if as_json:
            print_json(card.as_dict())
        else:
            Console().print(card_table(card, escape(model)))
        return
    if model in preset_names():
        raise ConfigError(
            f"{model} is a preset without a checkpoint; --memory and --precision need a model's "
            "folder"
        )
    skeleton = build(folder_of(model))
    budget = ledger(skeleton, settings)
    counts = budget.slots()  # refuses a budget below the floor
    if as_json:
        slots = {block.name: n for block, n in zip(budget.blocks, counts, strict=True)}
        print_json({**budget.as_dict(), "precision": precision, "slots": slots})
        return
    given = "everything resident" if memory is None else memory
    experts = "" if precision == NATIVE_PRECISION else f", experts in {precision}"
    title = f"{model} ({type(skeleton.model).__name__}, {skeleton.dtype}{experts}) in {given}"
    Console().print(ledger_table(budget, title))


def _is_ours(model: str) -> bool:
    """Whether the card of `dsmoe/card.py` can describe it; other families have the ledger."""
    if model in preset_names() or model == REFERENCE:
        return True
    file = Path(model).expanduser() / "config.json"
    try:
        family = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, LookupError, TypeError):
        return True  # a training run, damaged, or nothing: config_of() says which
    return family == "dsmoe"


@app.command(help="Speed of a model in a budget: prefill, decoding, and what bounds them.")
def bench(
    model: Model,
    memory: Memory = None,
    host_memory: HostMemory = None,
    mode: ModeOption = None,
    prefill: Prefill = None,
    bound: Bound = 0.3,
    precision: Precision = NATIVE_PRECISION,
    rest: Rest = NATIVE_PRECISION,
    plan: PlanFile = None,
    max_loss: MaxLoss = None,
    min_speed: MinSpeed = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    eviction: Annotated[str, typer.Option(help=f"one of {', '.join(POLICIES)}")] = DEFAULT_POLICY,
    seed: Annotated[int, typer.Option(help="of the random prompt")] = 0,
    context: Context = 2048,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Random tokens, so that a model with random weights does not repeat one; no locality."""
    serving = Serving(
        memory=memory,
        host_memory=host_memory,
        mode=mode,
        prefill=prefill,
        bound=bound,
        precision=precision,
        rest=rest,
        context=context,
        device=device,
        planned=Planned(plan=plan, max_loss=max_loss, min_speed=min_speed),
    )
    with serving.load(model, eviction=eviction) as served:
        bandwidth = measure_bandwidth(served.folder)
        vocabulary = served.model.config.get_text_config(decoder=True).vocab_size
        prompt_T = torch.randint(
            0, vocabulary, (prompt_tokens,), generator=torch.Generator().manual_seed(seed)
        )
        with console.status("measuring"):
            speed = measure_speed(
                served, bandwidth, prompt_T=prompt_T, new_tokens=new_tokens, seed=seed
            )
    if as_json:
        print_json(speed.as_dict())
    else:
        Console().print(speed_table(speed, bandwidth, f"{model}, mode {speed.mode}"))
