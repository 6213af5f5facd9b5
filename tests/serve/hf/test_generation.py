"""Settings of generation_config.json in `generate` and in the engine."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from engines import ask, greedy, running
from hypothesis import given
from hypothesis import strategies as st
from quick import slow_but
from safetensors.torch import load_file, save_file
from serving_http import client_of, fake_service
from tiny_served import VOCABULARY, saved, tiny, tokens
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

import moefit
from moefit.cli import app
from moefit.engine.api import SamplingParams
from moefit.errors import CheckpointError, ConfigError
from moefit.evaluate.loading import reference_path
from moefit.serve.hf.generation_config import GenerationDefaults, Suppressed, use_generation_config
from moefit.server import chat_backend as talk
from moefit.server.chat_backend import ChatOptions

PROMPT = tokens(1, 7)
Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Write a checkpoint with this generation_config.json, or None, and changes of config.json."""

    def write(generation: Any, family: str = "Mixtral", **config: Any) -> Path:
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        saved(tiny(family), folder)
        change(folder / "config.json", **config)
        file = folder / "generation_config.json"
        file.unlink(missing_ok=True)
        if generation is not None:
            text = generation if isinstance(generation, str) else json.dumps(generation)
            file.write_text(text)
        return folder

    return write


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def theirs(folder: Path, **how: Any) -> list[int]:
    """Return transformers' output."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(1)
    made = model.generate(PROMPT, max_new_tokens=12, pad_token_id=0, **how)
    return made[0, PROMPT.shape[1] :].tolist()


def ours(served: Any, **how: Any) -> list[int]:
    torch.manual_seed(1)
    made = served.generate(PROMPT, max_new_tokens=12, pad_token_id=0, **how)
    return made[0, PROMPT.shape[1] :].tolist()


def usual(written: Written) -> list[int]:
    """Return output without penalties and end tokens."""
    return theirs(written({}))


def by_default(served: Any) -> SamplingParams:
    """Return the greedy output of a request with default parameters."""
    return SamplingParams(**{"max_tokens": 12, **served.generation.sampling(), "temperature": 0.0})


@pytest.mark.parametrize("memory", [None, "1GiB"])
def test_eos_tokens_of_generation_config_end_output(written, memory) -> None:
    """Qwen3.5: config.json names the end of a text, generation_config.json also that of a turn."""
    answer = usual(written)
    folder = written({"eos_token_id": [answer[4], 60]}, eos_token_id=60)
    with moefit.load(folder, memory=memory) as served:
        assert ours(served) == theirs(folder) == answer[:5]
        with running(served) as engine:
            heard = ask(engine, PROMPT[0].tolist(), greedy(12)).wait()
            assert (heard.tokens, heard.end.reason) == (answer[:5], "stop")
            going_on = ask(engine, PROMPT[0].tolist(), greedy(12, ignore_eos=True)).wait()
            assert going_on.tokens == answer


@pytest.mark.parametrize("follow", ["auto", "none"])
def test_eos_tokens_default_to_config(written, follow) -> None:
    answer = usual(written)
    for generation in ({"temperature": 0.5}, {"eos_token_id": []}, None):
        folder = written(generation, eos_token_id=answer[4])
        with moefit.load(folder, generation_config=follow) as served:
            assert ours(served) == answer[:5]
            with running(served) as engine:
                assert ask(engine, PROMPT[0].tolist(), greedy(12)).wait().tokens == answer[:5]


def test_nested_config_without_generation_config(tmp_path: Path) -> None:
    config = transformers.Qwen3_5MoeConfig(text_config={"eos_token_id": 7})
    config.save_pretrained(tmp_path)
    change(tmp_path / "config.json", text_config={"eos_token_id": 7, "use_mtp": True})
    model: Any = SimpleNamespace(config=config, can_generate=lambda: True)
    use_generation_config(model, tmp_path, None)
    assert model.generation_config.eos_token_id == 7
    assert model.generation_config.use_mtp is None


@pytest.mark.parametrize(
    "rule",
    [
        lambda answer: {"repetition_penalty": 1.6},
        lambda answer: {"repetition_penalty": 0.6},
        lambda answer: {"suppress_tokens": [answer[0], answer[3], 500]},
        lambda answer: {"begin_suppress_tokens": [answer[0]]},
        lambda answer: {"bad_words_ids": [[answer[0], answer[1]], [answer[4]]]},
        lambda answer: {"bad_words_ids": [[int(PROMPT[0, -1]), answer[0]]]},
        lambda answer: {"bad_words_ids": [[answer[2]]], "eos_token_id": answer[2]},
        lambda answer: {
            "repetition_penalty": 1.3, "suppress_tokens": [answer[1]],
            "bad_words_ids": [[answer[3], answer[4], answer[5]]],
        },
    ],
)  # fmt: skip
def test_penalties_and_suppressed_tokens_match_transformers(written, rule) -> None:
    answer = usual(written)
    folder = written(rule(answer))
    expected = theirs(folder)
    assert expected != answer
    with moefit.load(folder) as served:
        assert ours(served) == expected
        with running(served) as engine:
            assert ask(engine, PROMPT[0].tolist(), by_default(served)).wait().tokens == expected
    if rule(answer).get("eos_token_id") is None:
        with moefit.load(folder, generation_config="none") as served:
            assert ours(served) == answer and served.generation.sampling() == {}
            with running(served) as engine:
                assert ask(engine, PROMPT[0].tolist(), by_default(served)).wait().tokens == answer


def test_encoder_decoder_penalties_cover_output(tmp_path: Path) -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=2,
        num_heads=4, num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, initializer_factor=3.0,
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(tmp_path)
    written = {"repetition_penalty": 3.0, "decoder_start_token_id": 0, "eos_token_id": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    expected = model.generate(PROMPT, max_new_tokens=8)[0, 1:].tolist()
    with moefit.load(tmp_path) as served, running(served) as engine:
        heard = ask(engine, PROMPT[0].tolist(), greedy(8, repetition_penalty=3.0)).wait()
        assert heard.tokens == expected


def test_multi_token_prediction_is_not_passed_to_generate(written) -> None:
    """MiniMax-M2 has use_mtp in config.json, and crashed."""
    answer = usual(written)
    for generation, config in (
        (None, {"use_mtp": True, "num_mtp_modules": 3}),
        ({"use_mtp": True, "prompt_lookup_num_tokens": 3, "cache_implementation": "static"}, {}),
        ({"cache_implementation": "of tomorrow", "stop_strings": ["a"]}, {}),
    ):
        with moefit.load(written(generation, **config), memory="1GiB") as served:
            assert ours(served) == answer


def test_sampling_defaults(written) -> None:
    own = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    with moefit.load(written({"do_sample": True, **own})) as served:
        assert served.generation.sampling() == own
        assert ours(served) == theirs(served.folder) != usual(written)
    with moefit.load(written({"do_sample": False, **own})) as served:
        assert served.generation.sampling() == own | {"temperature": 0.0}
    with moefit.load(written({"do_sample": True, "temperature": 0.0, "top_k": -1})) as served:
        assert served.generation.sampling() == {"temperature": 0.0, "top_k": 0}
        assert ours(served) == usual(written), "transformers refuses both of these values"
    with moefit.load(written({"do_sample": True, **own}), generation_config="none") as served:
        assert served.generation.sampling() == {}
        assert ours(served) == usual(written)
    with moefit.load(written(None, top_k=2, temperature=0.3)) as served:
        assert served.generation.sampling() == {}, "a config's top_k is its router's"


def test_unsupported_settings_are_named(written) -> None:
    given = {
        "no_repeat_ngram_size": 3, "min_new_tokens": 5, "forced_eos_token_id": 2, "num_beams": 4,
        "typical_p": 1.0, "length_penalty": 1.0, "guidance_scale": None, "max_new_tokens": 9,
        "stop_strings": ["x"], "cache_implementation": "hybrid",
    }  # fmt: skip
    with moefit.load(written(given)) as served:
        assert set(served.generation.unfollowed) == {
            "no_repeat_ngram_size", "min_new_tokens", "forced_eos_token_id", "num_beams",
            "stop_strings",
        }  # fmt: skip


def test_nan_logits_raise_for_any_settings(written) -> None:
    folder = written({"remove_invalid_values": True})
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with (
        moefit.load(folder) as served,
        pytest.raises(CheckpointError, match="logits are not finite"),
    ):
        ours(served)


@pytest.mark.parametrize("start", [-1, 10**6, [None, None]])
def test_decoder_start_is_a_token(tmp_path, start) -> None:
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=32, d_kv=8, d_ff=16, num_layers=2, num_decoder_layers=2, num_heads=4,
        num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path / "model"
    transformers.SwitchTransformersForConditionalGeneration(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    change(folder / "config.json", decoder_start_token_id=start)
    with pytest.raises(CheckpointError, match="begins with a token from 0 to"):
        moefit.load(folder)


@pytest.mark.parametrize(
    ("generation", "says"),
    [
        ("{", "cannot be used: Expecting"),
        ("[1]", "where an object belongs"),
        ("[" * 100_000, "cannot be used"),
        ({"temperature": "hot"}, "temperature is 'hot', but it is a number, 0 or more"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 2}, "top_p is 2, but it is a share"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, but it is a factor from 0.01"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', but it is a token"),
        ({"eos_token_id": [1, None]}, "eos_token_id"),
        ({"suppress_tokens": 5}, "suppress_tokens is 5, but it is a list of tokens"),
        ({"bad_words_ids": [5]}, "bad_words_ids"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"do_sample": "yes"}, "do_sample is 'yes', but it is true or false"),
        ({"max_new_tokens": -5}, "max_new_tokens"),
    ],
)
def test_damaged_generation_config_raises(written, generation, says) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be used") as caught:
        moefit.load(written(generation))
    assert says in str(caught.value)


def test_invalid_sampling_values_are_ignored(written) -> None:
    with moefit.load(written({"temperature": "hot"}), generation_config="none") as served:
        assert ours(served) == usual(written)


def test_unknown_generation_config_option_raises(written) -> None:
    with pytest.raises(ConfigError, match="generation_config='vllm' is not 'auto'"):
        moefit.load(written({}), generation_config="vllm")


@given(
    sequences=st.sets(st.lists(st.integers(0, 3), min_size=2, max_size=4).map(tuple), max_size=5),
    before=st.lists(st.integers(0, 3), max_size=6),
    first=st.booleans(),
)
def test_forbidden_tokens_are_not_generated(sequences, before, first) -> None:
    rules = Suppressed(
        always=frozenset({9}), first=frozenset({8}), sequences=tuple(sorted(sequences))
    )
    expected = {9} | ({8} if first else set())
    for token in range(4):
        text = [*before, token]
        expected |= {token for one in sequences if tuple(text[-len(one) :]) == one}
    recent = before[-rules.longest :] if rules.longest else []
    assert rules.now(recent, first=first) == expected


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> tuple[Path, list[int], str]:
    """A copy of the reference model, and its greedy output for `import os` as ids and text."""
    folder = tmp_path_factory.mktemp("reference") / "model"
    shutil.copytree(reference_path(), folder)
    with moefit.load(folder) as served:
        ids = served.tokenizer("import os", return_tensors="pt")["input_ids"]
        answer = served.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
        return folder, answer.tolist(), served.tokenizer.decode(answer)


def commanded(*arguments: str, **how: Any) -> Any:
    done = CliRunner().invoke(app, [*arguments], **how)
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize("memory", slow_but([()], [(), ("--memory", "2GiB")]))
def test_commands_use_generation_config(reference, memory) -> None:
    folder, answer, text = reference
    file = folder / "generation_config.json"
    asked = ("generate", str(folder), "import os", "--max-new-tokens", "20", *memory)
    try:
        file.write_text("{}")
        whole = commanded(*asked).stdout
        assert text in whole
        end = next(one for one in answer if answer.index(one) >= 4)
        file.write_text(json.dumps({"eos_token_id": [end, 0]}))
        assert len(commanded(*asked).stdout) < len(whole)
        own = {"do_sample": True, "temperature": 1.5, "top_k": 30}
        file.write_text(json.dumps(own))
        sampled = commanded(*asked)
        said = " ".join(sampled.stderr.split())
        assert "defaults from the model's generation_config.json: temperature 1.5, top_k 30" in said
        assert sampled.stdout != whole
        for greedy_ in (("--temperature", "0"), ("--top-p", "0"), ("--generation-config", "none")):
            assert commanded(*asked, *greedy_).stdout == whole
    finally:
        file.unlink()


def test_chat_uses_generation_config(reference) -> None:
    folder, answer, text = reference
    file = folder / "generation_config.json"
    asked = ("chat", str(folder), "--max-tokens", "20")
    try:
        file.write_text(json.dumps({"do_sample": False, "no_repeat_ngram_size": 2}))
        done = commanded(*asked, input="import os\n")
        assert text in done.stdout
        said = " ".join(done.stderr.split())
        assert "temperature 0" in said and "no_repeat_ngram_size" in said
        file.write_text(json.dumps({"do_sample": False, "eos_token_id": answer[6]}))
        stopped = commanded(*asked, input="import os\n").stdout
        assert text not in stopped and len(stopped) < len(done.stdout)
        asked = (*asked, "--generation-config", "none", "--seed", "1")
        assert commanded(*asked, input="import os\n").stdout.strip() not in done.stdout
    finally:
        file.unlink()


def test_local_chat_uses_generation_config(written) -> None:
    with moefit.load(written({"temperature": 0.4, "top_k": 9, "min_p": 0.2})) as served:
        default = served.generation
    for options, expected in (
        (ChatOptions(max_tokens=5), (0.4, 1.0, 9, 0.2)),
        (ChatOptions(max_tokens=5, temperature=0.9, top_p=0.5), (0.9, 0.5, 9, 0.2)),
    ):
        got = talk.to_sampling_params(options, default)
        assert (got.temperature, got.top_p, got.top_k, got.min_p) == expected
    assert (
        talk.to_sampling_params(ChatOptions(max_tokens=5), GenerationDefaults()).temperature == 0.7
    )


def test_http_requests_use_generation_config(served, monkeypatch) -> None:
    default = GenerationDefaults(
        temperature=0.3, top_p=0.8, top_k=20, min_p=0.05, repetition_penalty=1.1
    )
    monkeypatch.setattr(served, "generation", default)
    with fake_service(served) as (service, engine), client_of(service) as client:
        for path, body in (
            ("/v1/completions", {"prompt": [5]}),
            ("/v1/completions", {"prompt": [5], "temperature": None, "top_k": None}),
            ("/v1/completions", {
                "prompt": [5], "temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0,
                "repetition_penalty": 1,
            }),
        ):  # fmt: skip
            assert client.post(path, json=body).status_code == 200
    first, second, neutral = (
        (one.temperature, one.top_p, one.top_k, one.min_p, one.repetition_penalty)
        for _, one in engine.submitted
    )
    assert first == second == (0.3, 0.8, 20, 0.05, 1.1)
    assert neutral == (1, 1, 0, 0, 1)


@pytest.mark.parametrize(
    "generation",
    [
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
        {"dola_layers": "high"},
        {"constraints": [1], "force_words_ids": [[3]], "num_beams": 1},
        {"penalty_alpha": 0.5, "top_k": 4},
        {"num_beam_groups": 2, "diversity_penalty": 0.5},
        {"return_dict_in_generate": True, "output_scores": True, "token_healing": True},
    ],
)
def test_settings_that_need_remote_code_are_ignored(written, generation: dict[str, Any]) -> None:
    answer = usual(written)
    with moefit.load(written(generation)) as served:
        assert ours(served) == answer


def test_generate_prints_beam_search_output(tmp_path: Path) -> None:
    folder = shutil.copytree(reference_path(), tmp_path / "reference")
    (folder / "generation_config.json").write_text(
        json.dumps({"num_beams": 2, "dola_layers": "low"})
    )
    asked = ["generate", str(folder), "def main(", "--max-new-tokens", "6"]
    for more in ([], ["--mode", "exact"]):
        done = CliRunner().invoke(app, [*asked, *more])
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("def main(") and done.stdout.strip() != "def main("
        assert "not followed from the model's generation_config.json: dola_layers" in done.stderr


SLOW = [pytest.param(one, marks=pytest.mark.slow) for one in ('{"temperature": "hot"}', "[]")]


@pytest.mark.parametrize("damage", ["{", '{"top_k": -7}', *SLOW])
def test_measurements_ignore_generation_config(reference, damage: str, tmp_path: Path) -> None:
    folder, text = reference[0], tmp_path / "text.txt"
    text.write_text("import os, sys\n" * 40)
    file = folder / "generation_config.json"
    try:
        file.write_text(damage)
        speed = commanded("bench", str(folder), "--new-tokens", "1", "--context", "64", "--json")
        assert json.loads(speed.stdout)["new_tokens"] == 1
        scored = ("eval", str(folder), "--text", str(text), "--context", "32", "--json")
        commanded(*scored)
        stepwise = commanded(*scored, "--max-tokens", "40", "--mode", "exact")
        assert json.loads(stepwise.stdout)["tokens"] > 0
        failed = CliRunner().invoke(app, ["generate", str(folder), "import"])
        assert isinstance(failed.exception, CheckpointError)
    finally:
        file.unlink()
