"""Commands that use models: generate, describe, bench."""

import json
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, TextStreamer

from moefit.api import folder_of
from moefit.checkpoint.safetensors import Checkpoint
from moefit.checkpoint.tokenizer import refuse_without_tokenizer
from moefit.cli.app import (
    Json,
    advanced,
    command,
    console,
    option,
    print_json,
    progress_bar,
    say,
)
from moefit.cli.loading import (
    dense_line,
    draft_memory,
    dropout_line,
    estimate_table,
    import_serving_commands,
    is_served,
    load_served,
    minimums,
    minimums_line,
    packing_line,
    say_generation,
    shared_steps,
    speed_table,
)
from moefit.cli.options import (
    SERVING,
    Following,
    ForConcurrency,
    GenerationConfig,
    InferenceRule,
    MemoryOptions,
    Model,
    PrefetchName,
    SamplingOptions,
    ServingOptions,
    SpeculateOption,
    expand_options,
    torch_dtype,
)
from moefit.cli.precision import resolve_precision
from moefit.dsmoe.card import ModelCard, model_card
from moefit.dsmoe.presets import preset_names
from moefit.engine.api import SamplingParams
from moefit.engine.one_request import answer
from moefit.engine.speculation.drafts import Speculate, SpeculateSetting
from moefit.errors import ConfigError, DataError
from moefit.evaluate.bandwidth import measure_bandwidth
from moefit.evaluate.evaluated_model import evaluated_model
from moefit.evaluate.kernel_experts import use_kernels
from moefit.evaluate.loading import REFERENCE, config_of, load_full_model
from moefit.evaluate.passage import read_text
from moefit.evaluate.prediction import measure_prediction
from moefit.evaluate.report import prediction_tables
from moefit.evaluate.speed import measure_speed
from moefit.folders import is_gguf
from moefit.moe.expert_dropout import KEY, dropout_record
from moefit.moe.routing import Rule, default_rules
from moefit.serve.cache.eviction import DEFAULT_POLICY, POLICIES
from moefit.serve.config import NATIVE_PRECISION, LoadSettings
from moefit.serve.hf.generation_config import IGNORE, use_generation_config
from moefit.serve.hf.generation_config import SAMPLING as SAMPLING_NAMES
from moefit.serve.hf.guards import FiniteLogits
from moefit.serve.hf.skeleton import Skeleton, build_skeleton
from moefit.serve.layer.router_probe import use_rule
from moefit.serve.memory.budget import MemoryBudget, format_bytes
from moefit.serve.memory.estimate import initial_formats, memory_budget
from moefit.serve.model import ServedModel
from moefit.serve.packed.store import open_packed, unpacked_bytes
from moefit.serve.prediction.guesses import TRIAL_STEPS
from moefit.serve.prediction.probes import DEPTHS

_SEED_0 = SamplingOptions(seed=0)
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
    """Yield the rows of a model card: name and value. Raises ConfigError for an unknown dtype."""
    for part, count in card.parameters.as_dict().items():
        tied = part == "head" and count == 0
        yield _PARTS[part], "tied to the embeddings" if tied else _count(count)
    yield "total", _count(card.total)
    yield "total without embeddings", _count(card.total_without_embeddings)
    for rule in _rules(card):
        yield f"active, {rule}", _active(card, rule)
    yield f"weights in {dtype}", format_bytes(card.weight_bytes(dtype))
    yield f"KV cache in {dtype}", f"{format_bytes(card.kv_bytes_per_token(dtype))} a token"
    for rule in _rules(card):
        if rule.k is not None or rule.kind == "dense":
            forward = card.forward_flops_per_token(rule, context=(card.max_positions + 1) / 2)
            yield f"forward, {rule}", f"{forward / 1e9:,.3f} GFLOPs a token"
    flops = card.training_flops_per_token(card.max_positions)
    yield f"training at length {card.max_positions}", f"{flops / 1e9:,.3f} GFLOPs a token"


def card_table(card: ModelCard, title: str = "", *, dtype: str = "bfloat16") -> Table:
    """Return `card_rows` as a table; active parameters are counted without embeddings."""
    table = Table(title=title or None, show_header=False)
    table.add_column("what")
    table.add_column("how much", justify="right")
    for what, how_much in card_rows(card, dtype=dtype):
        if what in ("total", "active, dense", f"weights in {dtype}", "forward, dense"):
            table.add_section()
        table.add_row(what, how_much)
    return table


def _rules(card: ModelCard) -> list[Rule]:
    """Return the model's own rules, and others to compare them with."""
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


@command("generate")
@expand_options
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    rule: InferenceRule = None,
    max_new_tokens: Annotated[int, option("Maximum number of new tokens.", min=1)] = 128,
    sampling: SamplingOptions = _SEED_0,
    generation_config: GenerationConfig = Following.auto,
    speculate: SpeculateOption = "off",
    options: ServingOptions = SERVING,
) -> None:
    """Print the continuation to standard output as it is generated."""
    how = {**_generate_arguments(sampling), "max_new_tokens": max_new_tokens}
    following = generation_config.value
    torch.manual_seed(sampling.seed or 0)
    folder = folder_of(model)
    refuse_without_tokenizer(folder)
    drafting = Speculate.parse(speculate)
    drafts = drafting.setting != "off"
    if drafts or is_served(model, options):
        more = {"sequences": 1, **draft_memory(drafting, options.context)} if drafts else {}
        with load_served(model, options, generation_config=following, **more) as served:
            say_generation(served.generation, engine=drafts)
            if rule is not None:
                use_rule(served.model, Rule.parse(rule))
            if drafts:
                _stream_drafted(served, prompt, how, sampling.seed or 0, drafting.setting)
                return
            _stream(served.model, served.tokenizer, prompt, how)
        return
    loaded, tokenizer = load_full_model(
        str(folder), device=options.device, dtype=torch_dtype(options.dtype)
    )
    use_kernels(loaded)
    say_generation(use_generation_config(loaded, folder, tokenizer, following), engine=False)
    with nullcontext() if rule is None else evaluated_model(loaded).use(Rule.parse(rule)):
        _stream(loaded, tokenizer, prompt, how)


def _generate_arguments(sampling: SamplingOptions) -> dict[str, Any]:
    """Return sampling options as keyword arguments of transformers' `generate`.

    Options that affect how a token is drawn turn sampling on; otherwise the model decides.
    """
    given = sampling.given()
    given.pop("seed", None)
    if given.get("temperature") == 0 or given.get("top_p") == 0:
        penalty = given.get("repetition_penalty")
        return {"do_sample": False} | ({} if penalty is None else {"repetition_penalty": penalty})
    draws = given.keys() - {"repetition_penalty"}
    return {"do_sample": True, **given} if draws else given


def _stream(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, how: dict[str, Any]
) -> None:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise DataError("the prompt is empty; give at least one character")
    shown = {"skip_special_tokens": True}
    streamer = TextStreamer(tokenizer, skip_prompt=not _continues(model), **shown)
    beams = (model.generation_config.num_beams or 1) > 1  # output is known at the end only
    found = model.generate(
        **inputs,
        logits_processor=LogitsProcessorList([FiniteLogits()]),
        pad_token_id=tokenizer.eos_token_id,
        streamer=None if beams else streamer,
        **how,
    )
    if beams:
        print(tokenizer.decode(found[0], **shown))


def _stream_drafted(
    served: ServedModel, prompt: str, how: dict[str, Any], seed: int, speculate: SpeculateSetting
) -> None:
    """Print the continuation, by the engine: the greedy tokens of `_stream` without beams."""
    ids = served.tokenizer(prompt, return_token_type_ids=False)["input_ids"]
    if not ids:
        raise DataError("the prompt is empty; give at least one character")
    config: Any = served.model.generation_config
    draws = how.get("do_sample", config.do_sample)
    given = {name: value for name, value in how.items() if name in SAMPLING_NAMES}
    chosen: dict[str, Any] = {**served.generation.sampling(), **given}
    chosen = chosen if draws else {**chosen, "temperature": 0.0}
    if draws and chosen.get("temperature") != 0:
        say("note: with --speculate, a seed draws other tokens than without")
    if _continues(served.model):
        print(served.tokenizer.decode(ids, skip_special_tokens=True), end="", flush=True)
    params = SamplingParams(max_tokens=how["max_new_tokens"], seed=seed, **chosen)
    show = partial(print, end="", flush=True)
    answer(served, list(ids), params, speculate=speculate, show=show, remark=say)
    print()


def _continues(model: Any) -> bool:
    """Return whether the output continues the prompt, so that both are shown."""
    return not model.config.is_encoder_decoder


@command("describe")
@expand_options
def describe(
    model: Annotated[
        str, typer.Argument(help=f"Preset, or model as for eval: {', '.join(preset_names())}.")
    ],
    options: MemoryOptions = MemoryOptions(),  # noqa: B008 - immutable
    max_concurrency: ForConcurrency = None,
    as_json: Json = False,
) -> None:
    """Allocate no weights, so that the device need not be present."""
    shared: dict[str, Any] = {**shared_steps(max_concurrency)}
    import_serving_commands()
    if model not in preset_names():
        options = resolve_precision(model, options, **shared)
    settings = LoadSettings(**options.load_settings(), **shared)
    settings.check()
    changed = options.sets_memory or options.device != "cpu" or options.dtype is not None
    if not (changed or shared) and _has_card(model):
        card = model_card(config_of(model))
        if as_json:
            print_json({**card.as_dict(), **_dropout(config_of(model))})
        else:
            Console().print(card_table(card, escape(model)))
            _print_dropout(config_of(model))
        return
    if model in preset_names():
        raise ConfigError(
            f"{model} is a preset without a checkpoint; --memory and --precision need a model's "
            "folder"
        )
    _describe_memory(model, options, settings, as_json=as_json)


def _describe_memory(
    model: str, options: MemoryOptions, settings: LoadSettings, *, as_json: bool
) -> None:
    """Print the memory estimate, and the minimum budget of each command."""
    skeleton = build_skeleton(folder_of(model), settings.dtype, settings.adapter)
    packed = open_packed(skeleton, settings.formats(), [settings.dense_format()])
    budget = memory_budget(skeleton, settings, packed)
    start = initial_formats(skeleton, settings, budget, packed)  # raises below the minimum
    least = minimums(skeleton, settings, packed, budget)
    pairs = zip(skeleton.blocks, budget.slots(), strict=True)
    unpacked = unpacked_bytes(((one, settings.format(one), n) for one, n in pairs), packed)
    if as_json:
        slots = {one.name: n for one, n in zip(budget.blocks, budget.slots(), strict=True)}
        chosen = {
            "precision": options.experts,
            "rest": options.dense,
            "dense_from": packed.dense.source(settings.dense_format()),
            "kv_cache_dtype": budget.kv_dtype,
            "checkpoint": skeleton.stored().as_dict(),
            "unpacked_bytes": unpacked,
            "left_out": {
                group: {"tensors": number, "bytes": size}
                for group, (number, size) in skeleton.left_out().items()
            },
        }
        held = {"everything_in": budget.all_resident_bytes_in(), "minimum": least}
        trained = _dropout(skeleton.model.config)
        print_json(
            {**budget.as_dict(), **held, **chosen, "slots": slots, **start.as_dict(), **trained}
        )
        return
    source = packed.dense.source(settings.dense_format())
    described = f"{_described(skeleton, options)}{dense_line(options.dense, source)}"
    title = f"{model} ({described}) in {options.memory or 'no budget'}"
    Console().print(estimate_table(budget, start, title))
    Console().print(minimums_line(least, settings), soft_wrap=True)
    Console().print(escape(_stored(skeleton, budget)), soft_wrap=True)
    if unpacked:
        Console().print(escape(packing_line(model, unpacked, options.dtype)), soft_wrap=True)
    if unused := _left_out(skeleton):
        Console().print(escape(unused), soft_wrap=True)
    _print_dropout(skeleton.model.config)


def _dropout(config: Any) -> dict[str, Any]:
    """Return the record of expert dropout for JSON; nothing without one."""
    record = dropout_record(config)
    return {} if record is None else {KEY: record.as_dict()}


def _print_dropout(config: Any) -> None:
    """Print what fewer experts cost a model that was trained for that."""
    if trained := dropout_line(dropout_record(config)):
        Console().print(escape(trained), soft_wrap=True)


def _left_out(skeleton: Skeleton) -> str:
    """Return which tensors of the checkpoint are not loaded, as a sentence; empty if none."""
    groups = skeleton.left_out()
    if not groups:
        return ""
    number, size = (sum(column) for column in zip(*groups.values(), strict=True))
    some = [f"{group}.*" for group in groups][:3] + ["..."] * (len(groups) > 3)
    return (
        f"left out: {number:,} tensors with {format_bytes(size)} that the model does not use "
        f"({', '.join(some)})"
    )


def _stored(skeleton: Skeleton, budget: MemoryBudget) -> str:
    """Return how the checkpoint stores an expert, and what a slot takes, as a line."""
    stored, slot = skeleton.stored(), max(block.slot_bytes for block in budget.blocks)
    return (
        f"an expert in the checkpoint: {format_bytes(stored.expert_bytes)} "
        f"({', '.join(stored.experts)}); in a slot: {format_bytes(slot)}"
    )


def _described(skeleton: Skeleton, options: MemoryOptions) -> str:
    """Return the class, the dtype, and which weights are in another format."""
    parts = [type(skeleton.model).__name__, str(skeleton.dtype).removeprefix("torch.")]
    if options.experts != NATIVE_PRECISION:
        parts.append(f"experts in {options.experts}")
    return ", ".join(parts)


def _has_card(model: str) -> bool:
    """Return whether `dsmoe/card.py` describes the model; others have the memory estimate."""
    if model in preset_names() or model == REFERENCE:
        return True
    if is_gguf(Path(model).expanduser()):
        return False
    file = Path(model).expanduser() / "config.json"
    try:
        family = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, LookupError, TypeError):
        return True  # a training run, damaged, or nothing: config_of() says which
    return family == "dsmoe"


_TIMED, _PREDICTED, _PROMPT = 64, 512, 32  # tokens


@command("bench")
@expand_options
def bench(
    model: Model,
    options: ServingOptions = SERVING,
    prompt_tokens: Annotated[
        int | None, option(f"Length of the prompt in tokens. Default: {_PROMPT}.", min=1)
    ] = None,
    new_tokens: Annotated[
        int | None,
        option(
            f"Number of tokens to decode. Default: {_TIMED}, or {_PREDICTED} with --predict.", min=1
        ),
    ] = None,
    predict: Annotated[
        bool,
        advanced(
            "Measure on a text how well the next layers' experts are predicted, instead of speed.",
            "--predict",
        ),
    ] = False,
    text: Annotated[
        Path | None,
        advanced("UTF-8 text for --predict. Default: the held-out standard library."),
    ] = None,
    eviction: Annotated[
        str, advanced(f"Which expert is evicted first: {', '.join(POLICIES)}.")
    ] = DEFAULT_POLICY,
    seed: Annotated[int | None, advanced("Random seed of the prompt. Default: 0.")] = None,
    as_json: Json = False,
) -> None:
    """Decode random tokens, so that a model with random weights does not repeat one."""
    folder, how = folder_of(model), {"eviction": eviction, "generation_config": IGNORE}
    if predict:
        _refuse_with_predict(options, prompt_tokens, seed)
        _predict(model, options, text, new_tokens or _PREDICTED, how, as_json=as_json)
        return
    if text is not None:
        raise ConfigError(
            f"--text {text} is for --predict; speed is measured with random tokens: add --predict, "
            "or leave --text out"
        )
    if not is_gguf(folder):
        Checkpoint(folder).close()  # raises for missing and damaged files
    with console.status("measuring bandwidths"):  # before the model takes the memory
        bandwidth = measure_bandwidth(folder, torch.get_num_threads())
    with load_served(model, options, **how) as served:
        vocabulary = served.model.config.get_text_config(decoder=True).vocab_size
        prompt_T = torch.randint(
            0,
            vocabulary,
            (prompt_tokens or _PROMPT,),
            generator=torch.Generator().manual_seed(seed or 0),
        )
        with console.status("measuring"):
            speed = measure_speed(
                served,
                bandwidth,
                prompt_T=prompt_T,
                new_tokens=new_tokens or _TIMED,
                warm_up=_warm_up(served),
                seed=seed or 0,
            )
    if as_json:
        print_json(speed.as_dict())
    else:
        Console().print(speed_table(speed, bandwidth, f"{model}, mode {speed.mode}"))


def _warm_up(served: ServedModel) -> int:
    """Return the tokens to decode before speed is measured: enough to decide about prefetching."""
    prefetcher = served.prefetching.prefetcher
    missing = any(one.slot_table.num_slots < one.num_experts for one in served.blocks.values())
    decides = prefetcher is not None and prefetcher.trial is not None and missing
    return TRIAL_STEPS if decides and served.policy.mode == "exact" else 8


def _refuse_with_predict(
    options: ServingOptions, prompt_tokens: int | None, seed: int | None
) -> None:
    """Raise ConfigError for options that have no effect with --predict."""
    given = None
    if options.prefetch is not PrefetchName.off:
        given = f"--prefetch {options.prefetch.value}"
    elif options.prefetch_horizon > 1:
        given = f"--prefetch-horizon {options.prefetch_horizon}"
    elif prompt_tokens is not None:
        given = f"--prompt-tokens {prompt_tokens}"
    elif seed is not None:
        given = f"--seed {seed}"
    if given is not None:
        raise ConfigError(
            f"{given} is for measuring speed: --predict decodes a text and reads nothing early; "
            "leave one of the two out"
        )


def _predict(
    model: str,
    options: ServingOptions,
    text: Path | None,
    tokens: int,
    how: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Print how well the experts of later layers are predicted on a text."""
    with load_served(model, options, **how, prefetch="on", probe_depth=DEPTHS) as served:
        ids_T = read_text(text, served.tokenizer, options.context, None).ids_T[:tokens]
        with progress_bar("decoding") as show:
            report = measure_prediction(
                served, ids_T, progress=lambda done, total: show("decoding", done, total)
            )
    if as_json:
        print_json(
            {"model": model, "text": str(text or "held-out standard library")} | report.as_dict()
        )
        return
    for table in prediction_tables(report, model):
        Console().print(table)
