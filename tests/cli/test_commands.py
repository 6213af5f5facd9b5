import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
)
from typer.testing import CliRunner

import moefit
from moefit import demo
from moefit.checkpoint.safetensors import SINGLE
from moefit.cli import app, models
from moefit.cli.app import error_of
from moefit.engine.speculation.drafts import LOOKUP_BYTES, MAX_STEP_DRAFTS
from moefit.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LostProcessError,
    MoefitError,
    UnsupportedModelError,
)
from moefit.quant.cpu_kernels import status
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.precision.allocate import AUTO_FORMATS
from moefit.train.data.tokenizer import train_bpe


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe(["some text to learn from"], 300)
    model = tiny_model(
        vocab_size=300, qk_norm=True, num_attention_experts=1, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("some text to predict, " * 20)
    return str(path)


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_train_then_eval_then_generate(tree, tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    out = str(tmp_path / "cli-run")
    trained = json.loads(run("train", str(path), "steps=4", f"out={out}", "--json").stdout)
    assert trained["step"] == 4
    assert (tmp_path / "cli-run" / "curve.png").is_file()
    scores = json.loads(
        run("eval", out, "--text", text, "--rule", "dense", "--rule", "top_k:1", "--json").stdout
    )
    assert [score["rule"] for score in scores] == ["dense", "top_k:1"]
    assert scores[0]["active_parameters"] > scores[1]["active_parameters"]
    assert "expert" in run("generate", out, "expert router", "--max-new-tokens", "3").stdout


def test_eval_prints_table(saved, text):
    command = ["eval", saved, "--text", text, "--context", "16"]
    table = CliRunner().invoke(app, command, env={"COLUMNS": "80"}).stdout
    for words in ("dense", "top_k:2", "threshold_top_k:0.48", "experts", "perplexity", "tok/s"):
        assert words in table
    assert "…" not in table.split("perplexity")[1]


def test_other_families_load_without_budget(saved, tmp_path, text):
    shape = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    mixtral = tmp_path / "mixtral"
    MixtralForCausalLM(MixtralConfig(vocab_size=300, **shape, **heads)).save_pretrained(mixtral)
    AutoTokenizer.from_pretrained(saved).save_pretrained(mixtral)
    done = run("generate", str(mixtral), "some", "--max-new-tokens", "3")
    assert "some" in done.stdout and "MixtralForCausalLM in no budget" in done.stderr
    scored = run("eval", str(mixtral), "--text", text, "--max-tokens", "32", "--json")
    assert json.loads(scored.stdout)["substituted_mass"] == 0


def test_generate_uses_rule_and_seed(saved):
    sampled = ("generate", saved, "some", "--temperature", "1", "--max-new-tokens", "8")
    assert run(*sampled, "--seed", "1").stdout == run(*sampled, "--seed", "1").stdout
    assert run(*sampled, "--seed", "1").stdout != run(*sampled, "--seed", "2").stdout
    greedy = ("generate", saved, "some", "--max-new-tokens", "8")
    assert run(*greedy, "--rule", "dense").stdout == run(*greedy, "--rule", "top_k:5").stdout


def test_generate_with_drafts_prints_the_same(saved):
    command = ("generate", saved, "some some some some", "--max-new-tokens", "12")
    plain = run(*command, "--mode", "exact").stdout
    assert run(*command, "--speculate", "ngram").stdout == plain
    assert run(*command, "--speculate", f"draft:{saved}").stdout == plain
    with pytest.raises(ConfigError, match="one of off, ngram, mtp, draft:MODEL"):
        run(*command, "--speculate", "eagle")
    with pytest.raises(UnsupportedModelError, match="has no layer for multi-token prediction"):
        run(*command, "--speculate", "mtp")
    drawn = run(*command, "--speculate", "ngram", "--temperature", "1", "--seed", "3")
    assert "draws other tokens" in drawn.stderr and drawn.stdout != plain
    with pytest.raises(DataError, match="the prompt is empty"):
        run(*command[:2], "", "--speculate", "ngram")


@pytest.mark.parametrize("how", [("--plan", "x"), ("--max-loss", "3%"), ("--min-speed", "5")])
def test_plans_without_memory_for_the_mtp_layer_are_refused_before_planning(
    saved, monkeypatch, how
):
    monkeypatch.setattr("moefit.cli.loading.plan_for", lambda *_: pytest.fail("it planned"))
    with pytest.raises(ConfigError, match=r"--speculate mtp: .* use --speculate ngram or draft"):
        run("generate", saved, "some", "--memory", "1GiB", "--speculate", "mtp", *how)


def test_plans_count_a_draft_model_in_the_dtype_of_the_served_one(saved, monkeypatch):
    given = []

    def draft_bytes(settings: object, _: int) -> int:
        given.append(settings)
        raise MoefitError("enough")

    monkeypatch.setattr("moefit.cli.loading.draft_bytes", draft_bytes)
    how = ("--memory", "1GiB", "--max-loss", "3%", "--speculate", f"draft:{saved}")
    with pytest.raises(MoefitError, match="enough"):
        run("generate", saved, "some", *how)
    assert given[0].dtype == build_skeleton(Path(saved)).dtype


def test_generate_reserves_what_drafting_takes(saved, monkeypatch):
    """Logits of drafts and the index of the text, but no KV cache of other sequences."""
    given = {}

    def load(*_: object, **how: object) -> None:
        given.update(how)
        raise MoefitError("enough")

    monkeypatch.setattr("moefit.cli.models.load_served", load)
    command = ("generate", saved, "some", "--speculate", "ngram", "--context", "1000")
    with pytest.raises(MoefitError, match="enough"):
        run(*command)
    assert given["sequences"] == 1 and given["draft_rows"] == MAX_STEP_DRAFTS
    assert given["helpers"] == 1000 * LOOKUP_BYTES
    given.clear()
    with pytest.raises(MoefitError, match="enough"):
        run(*command[:4], f"draft:{saved}")
    assert given["draft_rows"] == MAX_STEP_DRAFTS and str(given["draft"]) == str(saved)
    with pytest.raises(CheckpointError, match="there is no folder"):
        run(*command[:4], "draft:nowhere/at/all")


def test_generate_uses_sampling_options(saved):
    greedy = run("generate", saved, "some", "--max-new-tokens", "8").stdout
    for way in (("--top-k", "1"), ("--min-p", "1"), ("--top-p", "0"), ("--temperature", "0")):
        assert run("generate", saved, "some", "--max-new-tokens", "8", *way).stdout == greedy, way
    for way in (("--top-p", "1"), ("--top-k", "0"), ("--min-p", "0"), ("--temperature", "1")):
        drawn = {
            run(
                "generate", saved, "some", "--max-new-tokens", "8", "--seed", str(seed), *way
            ).stdout
            for seed in range(3)
        }
        assert len(drawn) > 1, way
    penalty = ("--repetition-penalty", "100")
    assert run("generate", saved, "some", "--max-new-tokens", "8", *penalty).stdout != greedy


def test_json_option_prints_errors_as_json(tmp_path):
    script = "import sys; sys.argv[0] = 'moefit'; from moefit.cli.app import main; main()"
    script = f"import moefit.cli; {script}"
    command = [sys.executable, "-c", script, "describe", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "error: CheckpointError: " in done.stderr
    told = json.loads(done.stdout)["error"]
    assert told["type"] == "CheckpointError" and str(tmp_path) in told["message"]
    error = error_of(done.stdout)
    assert type(error) is CheckpointError and str(error) == told["message"]


def test_a_lost_process_keeps_no_command_from_ending():
    """A thread that saves may wait half an hour for the part of the lost process."""
    script = (
        "import sys, threading, time, moefit.cli.app\n"
        "from moefit.errors import LostProcessError\n"
        "def train():\n"
        "    threading.Thread(target=time.sleep, args=(30,)).start()\n"
        "    raise LostProcessError('process 0 of 2 lost contact with process 1')\n"
        "module = sys.modules['moefit.cli.app']\n"
        "module.app = train\n"
        "module.main()"
    )
    command = [sys.executable, "-c", script, "train", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=25)
    assert done.returncode == 2 and "lost contact with process 1" in done.stderr
    assert type(error_of(done.stdout)) is LostProcessError


@pytest.mark.parametrize("kind", ["ConfigError", "printable", "SystemExit", 3, None])
def test_error_codes_follow_error_classes(kind):
    error = error_of(json.dumps({"error": {"type": str(kind), "message": "why"}}))
    assert type(error) is ConfigError and str(error) == "why"
    assert error_of("") is error_of("{}") is error_of('{"error": 1}') is error_of("[]") is None


def test_serving_reports_kernels(saved):
    served = run("generate", saved, "some", "--mode", "exact", "--max-new-tokens", "1")
    assert f"mode exact, kernels: {status()}" in " ".join(served.stderr.split())


def test_describe(saved):
    card = json.loads(run("describe", "dsmoe-3b", "--json").stdout)
    assert 2.7e9 < card["total_without_embeddings"] < 2.9e9
    assert "KV" in run("describe", "dsmoe-3b").stdout
    assert json.loads(run("describe", saved, "--json").stdout)["total"] < 1e6


def test_describe_estimates_for_gpu(saved):
    asked = ("describe", saved, "--device", "cuda", "--host-memory", "1MiB")
    ledger = json.loads(run(*asked, "--memory", "1GiB", "--json").stdout)
    assert ledger["host"] == 1 << 20 and ledger["process"] == torch.cuda.memory_reserved()
    assert "host memory, beside the budget" in run(*asked).stdout


def test_describe_precision_equals_estimate(saved):
    native, int4 = (
        json.loads(run("describe", saved, "--precision", name, "--memory", "9GiB", "--json").stdout)
        for name in ("native", "int4")
    )
    assert (native["precision"], int4["precision"]) == ("native", "int4")
    assert "experts in int4" in run("describe", saved, "--precision", "int4").stdout


def test_int8_kv_cache_is_estimated_and_used(saved, text):
    own, rounded = (
        json.loads(run("describe", saved, "--memory", "9GiB", "--json", *more).stdout)
        for more in ((), ("--kv-cache", "int8"))
    )
    assert (own["kv_cache_dtype"], rounded["kv_cache_dtype"]) == ("float32", "int8")
    assert 2 * rounded["kv_cache"] == own["kv_cache"], "a byte a value, four a head of four"
    assert "KV cache (int8)" in run("describe", saved, "--kv-cache", "int8").stdout
    said = run("describe", saved, "--memory", "9GiB", "--kv-cache", "int8").stderr
    assert "no loss but that of the int8 KV cache" in " ".join(said.split())
    asked = ("eval", saved, "--text", text, "--context", "40", "--kv-cache", "int8", "--json")
    score = json.loads(run(*asked).stdout)
    assert score["against"] == "native" and 0 < abs(score["loss"]) < 0.02
    for command in (("generate", saved, "expert"), ("bench", saved, "--new-tokens", "3")):
        assert run(*command, "--kv-cache", "int8").exit_code == 0


def test_describe_for_server(saved):
    in_all = ("--memory", "9GiB", "--context", "64")
    one, many = (
        json.loads(run("describe", saved, *in_all, *more, "--json").stdout)
        for more in ((), ("--max-concurrency", "9"))
    )
    vocabulary, float32, tokens = 300, 4, one["context"]
    others, prompts = 8 * vocabulary * 2 * float32, tokens * vocabulary * float32
    assert many["workspace"] - one["workspace"] == others + prompts
    alone = json.loads(run("describe", saved, *in_all, "--max-concurrency", "1", "--json").stdout)
    assert alone["workspace"] - one["workspace"] == prompts


def test_describe_server_requests_may_exceed_context_in_total(saved):
    found = [
        json.loads(run("describe", saved, "--memory", "9GiB", *more, "--json").stdout)["context"]
        for more in ((), ("--max-concurrency", "9"), ("--max-concurrency", "9", "--context", "100"))
    ]
    assert found == [64, 9 * 64, 100]


def test_describe_auto_lists_formats(saved):
    asked = ("describe", saved, "--precision", "auto", "--dense-precision", "int8")
    ledger = json.loads(run(*asked, "--memory", "9GiB", "--json").stdout)
    assert (ledger["precision"], ledger["rest"]) == ("auto", "int8")
    assert ledger["formats"] == {"native": sum(ledger["slots"].values())}
    assert list(ledger["everything_in"]) == list(AUTO_FORMATS)
    assert ledger["everything_in"]["native"] == ledger["most"]
    table = " ".join(run(*asked, "--memory", "9GiB").stdout.split())
    assert "all experts in int4" in table and "all experts in native" in table
    assert "experts in auto, dense weights in int8" in table
    assert f"native: {ledger['bits_per_weight']:.2f} bits" in table and "experts in int2" in table


def test_eval_names_reference_of_encoded_model(saved, text):
    asked = ("eval", saved, "--text", text, "--context", "32", "--max-tokens", "64")
    asked = (*asked, "--precision", "int2", "--rule", "top_k:2")
    beside = json.loads(run(*asked, "--json").stdout)
    native = run("eval", saved, *asked[2:8], "--rule", "top_k:2", "--mode", "exact", "--json")
    assert beside["against"] == "native"
    assert beside["full"] == pytest.approx(json.loads(native.stdout)["full"])
    assert beside["stepwise"] != beside["full"]
    ledger = json.loads(run("describe", saved, "--precision", "int2", "--json").stdout)
    alone = run(*asked, "--memory", str(ledger["everything"] + (16 << 20)))
    assert "against itself, all experts in int2" in " ".join(alone.stdout.split())


def test_unpacked_precision_names_pack_command(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ("generate", saved, "some", "--max-new-tokens", "2", "--precision", "int4")
    told = run(*command)
    assert "experts in int4, encoded while reading" in told.stderr
    advice = told.stderr.split("run: moefit ")[1].split("\n")[0]
    assert advice == f"pack {saved} --formats int4"
    run(*advice.split())
    after = run(*command)
    assert "experts in int4, packed" in after.stderr and "note:" not in after.stderr
    assert after.stdout == told.stdout


def test_unpacked_dense_weights_name_pack_command(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ("generate", saved, "some", "--max-new-tokens", "2", "--dense-precision", "int4")
    told = run(*command)
    assert "dense weights in int4, encoded while loading" in told.stderr
    advice = told.stderr.split("run: moefit ")[1].split("\n")[0]
    assert advice == f"pack {saved} --dense-formats int4"
    run(*advice.split())
    after = run(*command)
    assert "dense weights in int4, packed" in after.stderr and "note:" not in after.stderr
    assert after.stdout == told.stdout
    described = run("describe", saved, "--dense-precision", "int4")
    assert "dense weights in int4, packed" in " ".join(described.stdout.split())

    adapter, name = tmp_path / "adapter", "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    adapter.mkdir()
    rows, cols = load_file(Path(saved) / SINGLE)["model.layers.0.self_attn.q_proj.weight"].shape
    lora = {f"{name}A.weight": torch.ones(1, cols), f"{name}B.weight": torch.ones(rows, 1)}
    save_file(lora, adapter / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    adapted = run(*command, "--adapter", str(adapter))
    assert "dense weights in int4, encoded while loading" in adapted.stderr
    assert "without the adapter given now" in adapted.stderr
    assert "once you have run" not in adapted.stderr, "it would not help"


def test_bench_measures_bandwidths_before_loading(saved, monkeypatch):
    """The measuring process has ended when the model allocates memory."""
    order = []
    for name in ("measure_bandwidth", "load_served"):
        original = getattr(models, name)

        def called(*args, name=name, original=original, **settings):
            order.append(name)
            return original(*args, **settings)

        monkeypatch.setattr(models, name, called)
    found = json.loads(run("bench", saved, "--new-tokens", "2", "--context", "64", "--json").stdout)
    assert found["memory_bound"] > 0
    assert order == ["measure_bandwidth", "load_served"]


def test_export(saved, tmp_path):
    run("export", saved, str(tmp_path / "olmoe"), "--experts-per-token", "2")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "olmoe").config.num_experts_per_tok == 2


def test_export_as_gguf(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the package gguf (moefit[gguf])")
    tokenizer = train_bpe(["some text to learn from"], 300)
    config = OlmoeConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), "--format", "gguf"]
    shown = run(*command, str(tmp_path / "a.gguf"), "--type", "q8_0", "--json").stdout
    found = json.loads(shown)
    assert (found["architecture"], found["type"], found["tokenizer"]) == ("olmoe", "q8_0", True)
    assert found["bytes"] == (tmp_path / "a.gguf").stat().st_size
    run(*command, str(tmp_path / "b.gguf"), "--no-tokenizer")
    types = {one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert types == {"F16", "F32"}


def test_export_of_threshold_model(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text())
    config["inference_rule"] = "threshold:0.48:renormalize"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="norm_topk_prob=True"):
        run("export", str(folder), str(tmp_path / "olmoe"), "-k", "2")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "olmoe").config
    assert (written.num_experts_per_tok, written.norm_topk_prob) == (2, True)


def test_trained_olmoe_is_exported_and_scored(tree, tmp_path, text):
    settings = {**tree, "out": str(tmp_path / "run"), "steps": 4, "loss": {"mlp_mi": 0.02}}
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: tree["model"][name] for name in (*names, "num_experts")}
    settings["model"] = {"architecture": "olmoe", **sizes}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    run("train", str(tmp_path / "run.yaml"))
    run("export", str(tmp_path / "run"), str(tmp_path / "olmoe"), "-k", "2")
    scored = [
        json.loads(run("eval", str(tmp_path / name), "--text", text, "--json").stdout)
        for name in ("run", "olmoe")
    ]
    assert [score["rule"] for score in scored[0]] == ["dense", "top_k:2", "top_k:1"]
    for ours, theirs in zip(*scored, strict=True):
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-4)
    words = run("generate", str(tmp_path / "olmoe"), "expert", "--rule", "dense").stdout
    assert words.startswith("expert")


def test_brackets_in_paths_are_printed(saved, tmp_path, text):
    folder = tmp_path / "[bold]x[" / "[red]"
    shutil.copytree(saved, folder)
    command = ["eval", str(folder), "--text", text, "--rule", "dense"]
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "400"}).stdout
    assert "[bold]x[/[red]on" in "".join(shown.split())
    described = CliRunner().invoke(app, ["describe", str(folder)], env={"COLUMNS": "400"}).stdout
    assert "[red]" in "".join(described.split())


def test_stopped_demo_has_signal_exit_code(monkeypatch):
    figures = {"training": {"stopped_by": "SIGINT"}}
    monkeypatch.setattr(demo, "run", lambda *args, **options: figures)
    assert run("demo").exit_code == 130
    figures["training"]["stopped_by"] = None
    assert run("demo").exit_code == 0


def test_version():
    assert run("--version").stdout.strip() == moefit.__version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval", "no-such-model"], "there is no folder"),
        (["describe", "dsmoe-4b"], "did you mean"),
        (["bench", "OLMOE"], "has neither model.safetensors"),
        (["describe", "OLMOE"], "has neither model.safetensors"),
        (["describe", "DAMAGED"], "config.json cannot be read"),
        (["eval", "MODEL", "--device", "foo"], "device='foo' is not available here"),
        (
            ["generate", "MODEL", "some", "--device", "cuda:99"],
            "device='cuda:99' is not available here",
        ),
        (["describe", "MODEL", "--precision", "int9"], "'int9' does not exist"),
        (["generate", "MODEL", "some", "--precision", "int1"], "nearest: int2"),
        (["describe", "dsmoe-3b", "--precision", "int4"], "is a preset without a checkpoint"),
        (["train", "steps=-1"], "steps"),
        (["train", "data.sources=[/no/such/folder]"], "does not exist"),
        (["train", "no-such.yaml"], "cannot read the configuration"),
        (["eval", "MODEL", "--text", "/no/such/file"], "cannot read"),
        (["eval", "MODEL", "--rule", "top_k:6"], "top_k:5"),
        (["eval", "MODEL", "--host-memory", "1GiB"], "on a CPU the slots themselves"),
        (["generate", "MODEL", "some", "--host-memory", "1GiB"], "on a CPU the slots themselves"),
        (["bench", "MODEL", "--host-memory", "1GiB"], "on a CPU the slots themselves"),
        (["describe", "MODEL", "--host-memory", "1GiB"], "on a CPU the slots themselves"),
        (["eval", "MODEL", "--rule", "best"], "is not an inference rule"),
        (["generate", "MODEL", ""], "the prompt is empty"),
        (["export", "MODEL", "OUT", "-k", "6"], "6"),
        (["export", "MODEL", "OUT"], "give --experts-per-token K, or --format gguf"),
        (["export", "MODEL", "OUT", "-k", "2", "--type", "f16"], "--type is an option of"),
        (["export", "OLMOE", "OUT", "--format", "gguf", "-k", "2"], "--experts-per-token is an"),
    ],
)
def test_invalid_arguments_raise(saved, tmp_path, arguments, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    OlmoeConfig().save_pretrained(tmp_path / "OLMOE")
    (tmp_path / "DAMAGED").mkdir()
    (tmp_path / "DAMAGED" / "config.json").write_text('{"model_type": "dsm')
    places = {"MODEL": saved, "OUT": str(tmp_path / "out")}
    with pytest.raises(MoefitError, match=words):
        run(*(places.get(argument, argument) for argument in arguments))


@pytest.mark.slow  # a process of its own, as in the test of --json
def test_error_prints_one_message_and_exits_with_2():
    command = [sys.executable, "-m", "moefit", "describe", "dsmoe-4b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ConfigError: 'dsmoe-4b' is not a preset")
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # a process of its own
def test_terminal_without_utf_8(saved):
    command = [sys.executable, "-m", "moefit", "generate", saved, "größe ☃", "--max-new-tokens=1"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert done.stdout.startswith(b"gr??e ?")
