"""Damaged, foreign and malicious checkpoints raise moefit's errors in bounded time."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_served import logits, saved, tiny, tokens
from typer.testing import CliRunner

from moefit.checkpoint import config
from moefit.checkpoint.safetensors import INDEX, SINGLE, Checkpoint
from moefit.checkpoint.tokenizer import read_tokenizer
from moefit.cli import app
from moefit.errors import CheckpointError, ConfigError, MoefitError, UnsupportedModelError
from moefit.evaluate.loading import load_full_model as load_plainly
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.load import load_model
from moefit.train.data.tokenizer import train_bpe

DELETED = "(deleted)"  # a plain text: parameters of tests are named alike in every process


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OLMoE, which every command supports, with a tokenizer."""
    folder = saved(tiny("Olmoe", vocab_size=300), tmp_path_factory.mktemp("sound"))
    train_bpe(["some text"], 300).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def change(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not DELETED}))
    return folder


WRONG_VALUES: list[tuple[dict[str, Any], str | None]] = [
    ({"num_hidden_layers": 10**6}, r"num_hidden_layers=1000000, but .* hold \d+ tensors"),
    ({"num_hidden_layers": 10**30}, "num_hidden_layers=10000"),
    ({"num_experts": 10**12}, "num_experts=1000000000000"),
    ({"num_hidden_layers": 0}, None),
    ({"num_hidden_layers": -1}, None),
    ({"num_experts": 0}, None),
    ({"num_experts": 5}, None),
    ({"num_experts_per_tok": 0}, None),
    ({"num_experts_per_tok": -1}, None),
    ({"num_experts_per_tok": 99}, None),
    ({"hidden_size": 0}, None),
    ({"hidden_size": -32}, None),
    ({"hidden_size": 10**9}, None),
    ({"hidden_size": "32"}, None),
    ({"hidden_size": None}, None),
    ({"hidden_size": [32]}, None),
    ({"intermediate_size": 12}, None),
    ({"vocab_size": 0}, None),
    ({"vocab_size": 10**10}, "bytes of weights, but the checkpoint's files hold"),
    ({"num_attention_heads": 0}, None),
    ({"num_key_value_heads": 3}, None),
    ({"hidden_act": "no_such"}, "no_such"),
    ({"hidden_act": 7}, None),
    ({"dtype": "int4"}, "dtype is 'int4'"),
    ({"dtype": "nn", "torch_dtype": DELETED}, "dtype is 'nn'"),
    ({"dtype": "int32"}, "dtype is 'int32'"),
    ({"rope_parameters": "x"}, None),
    ({"eos_token_id": 10**30}, "eos_token_id is 1000"),
    ({"pad_token_id": "</s>"}, "pad_token_id is '</s>'"),
    ({"bos_token_id": 1.5}, "bos_token_id is 1.5"),
    ({"model_type": None}, "model"),
    ({"model_type": ["olmoe"]}, "model"),
]


def everywhere(folder: Path, words: str | None) -> None:
    """Serving, describing and loading each raise a moefit error."""
    ways: list[Callable[[], Any]] = [
        lambda: load_model(folder, LoadSettings()).close(),
        lambda: load_plainly(str(folder)),
    ]
    for way in ways:
        with pytest.raises(MoefitError, match=words) as caught:
            way()
        assert "\x1b" not in str(caught.value)
        assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(("changes", "words"), WRONG_VALUES, ids=str)
def test_invalid_value_raises(folder: Path, changes: dict[str, Any], words: str | None) -> None:
    everywhere(change(folder, **changes), words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "olmoe", "x": ' + "[" * 10_000 + "]" * 10_000 + "}", "cannot be read"),
        ('{"x": ' + '{"x": ' * 40 + "1" + "}" * 41, "nested more than 32 levels"),
        (" " * (9 << 20) + "{}", "more than 8,388,608 bytes"),
        ('{"num_experts": ' + "9" * 5000 + "}", "cannot be read"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        ("\0", "cannot be read"),
        ('{"model_type": "a\\u001b[2Jb"}', "control characters"),
        ('{"a\\u001b[2Jb": 1}', "control characters"),
    ],
    ids=lambda text: text[:40],
)
def test_non_configuration_raises(folder: Path, text: str, words: str) -> None:
    (folder / "config.json").write_text(text)
    everywhere(folder, words)


COMMANDS = [
    ["describe", "MODEL"],
    ["describe", "MODEL", "--memory", "1GiB"],
    ["generate", "MODEL", "some"],
    ["generate", "MODEL", "some", "--memory", "1GiB"],
    ["serve", "MODEL", "--port", "0"],
    ["eval", "MODEL"],
    ["eval", "MODEL", "--memory", "1GiB"],
    ["bench", "MODEL"],
    ["pack", "MODEL"],
    ["export", "MODEL", "OUT", "-k", "2"],
    ["profile", "MODEL"],
    ["plan", "MODEL"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 10**6}, {"hidden_act": "no\x7f_such"}], ids=str
)
def test_every_command_reports_damage(
    folder: Path, tmp_path: Path, command: list[str], changes: dict[str, Any]
) -> None:
    change(folder, **changes)
    (tmp_path / "text").write_text("some text " * 400)
    places = {"MODEL": str(folder), "OUT": str(tmp_path / "out")}
    text = ["--text", str(tmp_path / "text")] if command[0] in ("eval", "profile") else []
    result = CliRunner().invoke(app, [places.get(word, word) for word in command] + text)
    assert isinstance(result.exception, MoefitError), result.output
    assert "\x7f" not in str(result.exception)


@pytest.mark.slow  # a process of its own
def test_damage_prints_one_line_and_exits_with_2(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "\\u001b]0;title\\u0007"}')
    command = [sys.executable, "-m", "moefit", "describe", str(folder), "--memory", "1GiB"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: CheckpointError: ")
    assert "\x1b" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_messages_are_printable() -> None:
    error = ConfigError("a \x1b[2J name\u202e with\x00 \x9b31m escapes\nand a second line")
    assert str(error) == "a \\x1b[2J name\\u202e with\\x00 \\x9b31m escapes\nand a second line"


def write_index(folder: Path, shard: object) -> None:
    tensors = load_file(folder / SINGLE)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd", "", ".", "a/../../x", "a\0b", 5, None, ["x"]]
)
def test_index_with_outside_path_raises(folder: Path, shard: object) -> None:
    shutil.copy(folder / SINGLE, folder.parent / "other.safetensors")
    write_index(folder, shard)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*weight_map"):
        Checkpoint(folder)


def test_hub_cache_links_are_read(folder: Path) -> None:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(os.path.relpath(blobs / file.name, folder))
    write_index(folder, SINGLE)
    load_model(folder, LoadSettings()).close()


@pytest.mark.parametrize("values", ["flash_attention_2", "somebody/kernel", 7, {"": "x"}])
def test_config_cannot_choose_kernels(folder: Path, values: object) -> None:
    keys = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
    change(folder, **dict.fromkeys(keys, values), experts_implementation=values, use_kernels=True)
    assert build_skeleton(folder).model.config._attn_implementation in ("sdpa", "eager")
    with load_model(folder, LoadSettings()) as served:
        expected = tiny("Olmoe", vocab_size=300)(tokens(1, 5)).logits
        torch.testing.assert_close(served.model(tokens(1, 5)).logits, expected)
    assert load_plainly(str(folder))[0].config._attn_implementation in ("sdpa", "eager")


def with_own_code(folder: Path, **changes: Any) -> Path:
    """Code that creates a file when it runs."""
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        mark = f"open({str(folder / 'ran')!r}, 'w').close()\nraise SystemExit('it ran')\n"
        (folder / f"{name}.py").write_text(mark)
    own = {
        "AutoConfig": "configuration_x.X",
        "AutoModelForCausalLM": "modeling_x.X",
        "AutoTokenizer": ["tokenization_x.X", None],
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "X", "auto_map": {"AutoTokenizer": own["AutoTokenizer"]}})
    )
    return change(folder, auto_map=own, **changes)


def refuse_to_ask(*_: object) -> str:
    raise AssertionError("it asks at the terminal")


def test_custom_code_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", refuse_to_ask)
    with_own_code(folder, model_type="of_our_own", architectures=["OfOurOwn"])
    with pytest.raises(UnsupportedModelError, match=r"'of_our_own' model, .*never run"):
        load_model(folder, LoadSettings())
    with pytest.raises(UnsupportedModelError, match="never run"):
        load_plainly(str(folder))
    with_own_code(folder, model_type="olmoe", architectures=["OlmoeForCausalLM"])
    load_model(folder, LoadSettings()).close()
    load_plainly(str(folder))
    read_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MoefitError, match="tokenizer"):
        load_plainly(str(folder))
    with pytest.raises(MoefitError, match="tokenizer"):
        read_tokenizer(folder)
    assert not (folder / "ran").exists()


def test_kimi_k2_is_deepseek_v3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", refuse_to_ask)
    model = tiny("DeepseekV3")
    folder = with_own_code(saved(model, tmp_path), model_type="kimi_k2")
    with load_model(folder, LoadSettings()) as served:
        assert type(served.model) is type(model)
        ids_BT = tokens(2, 9)
        torch.testing.assert_close(logits(served.model, ids_BT), logits(model, ids_BT))
    config = (folder / "tokenizer_config.json").read_text()
    written = train_bpe(["some text"], 300)
    written.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(config)
    assert read_tokenizer(folder)("some text").input_ids == written("some text").input_ids
    assert not (folder / "ran").exists()


def rewritten(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    tensors = load_file(folder / SINGLE)
    changed = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(changed, folder / SINGLE, metadata={"format": "pt"})
    return folder


def of_expert(name: str) -> bool:
    return ".experts.1." in name


@pytest.mark.parametrize(
    "change_one",
    [
        lambda name, x: x.T if of_expert(name) and "down_proj" in name else x,
        lambda name, x: x.T if of_expert(name) and "up_proj" in name else x,
        lambda name, x: x.flatten() if of_expert(name) else x,
        lambda name, x: x.reshape(2, -1) if of_expert(name) and "gate_proj" in name else x,
        lambda name, x: x.T if name.endswith("q_proj.weight") else x[:-1] if "norm" in name else x,
        lambda name, x: x[None] if "router" in name or "gate.weight" in name else x,
    ],
)
def test_tensor_of_another_shape_raises(folder: Path, change_one: Any) -> None:
    rewritten(folder, change_one)
    with pytest.raises((CheckpointError, UnsupportedModelError), match=r"shape|becomes|made from"):
        build_skeleton(folder)


def write_header(path: Path, header: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def test_header_with_too_many_tensors_raises(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moefit.checkpoint.safetensors._MAX_TENSORS", 500)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    names = [f"t{number}" for number in range(600)]
    write_header(folder / SINGLE, json.dumps(dict.fromkeys(names, entry)).encode())
    with pytest.raises(CheckpointError, match="600 tensors, which no known model has"):
        build_skeleton(folder)


@pytest.mark.parametrize(
    "header",
    [
        {"a\x1b[2J": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F\x1b[2J", "shape": [0], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]}},
        {"__metadata__": ["x"]},
    ],
)
def test_malicious_header_raises(folder: Path, header: object) -> None:
    write_header(folder / SINGLE, json.dumps(header).encode())
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged") as caught:
        build_skeleton(folder)
    assert "\x1b" not in str(caught.value)


def test_git_lfs_pointer_raises(folder: Path) -> None:
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(CheckpointError, match=r"Git LFS pointer .* run `git lfs pull`"):
        build_skeleton(folder)


VALUES = [
    0, -1, 1, 3, 2**31, 10**12, 10**19, 10**40, 0.5, -2.5, float("nan"), float("inf"), "", "7",
    "silu", "auto", "\x1b[2J", None, True, False, [], [1, 2], ["a"], [None], {}, {"a": 1},
]  # fmt: skip


def mutated(values: Any, rng: random.Random) -> Any:
    """Change, remove or duplicate one value."""
    values = deepcopy(values)
    at = values
    while True:
        key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.7:
            at = at[key]
            continue
        match rng.randrange(6):
            case 0:
                del at[key]
            case _:
                at[key] = deepcopy(rng.choice(VALUES))
        return values


def try_to_serve(folder: Path) -> None:
    try:
        load_model(folder, LoadSettings()).close()
    except MoefitError as error:
        assert "\x1b" not in str(error)
        assert len(str(error)) < 2000


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_configurations_raise_moefit_errors(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    original = json.loads((folder / "config.json").read_text())
    for _ in range(12):
        (folder / "config.json").write_text(json.dumps(mutated(original, rng)))
        try_to_serve(folder)


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_headers_raise_moefit_errors(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    content = (folder / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for _ in range(25):
        text = json.dumps(mutated(header, rng)).encode()
        changed = struct.pack("<Q", len(text)) + text + content[8 + length :]
        (folder / SINGLE).write_bytes(changed)
        try:
            build_skeleton(folder)
        except MoefitError as error:
            assert "\x1b" not in str(error)


def test_implausible_counts_raise(folder: Path) -> None:
    with Checkpoint(folder) as files:
        config.refuse_absurd_counts({"num_hidden_layers": 61, "n_experts": 8}, files)
        for key in ("num_hidden_layers", "n_layer", "n_routed_experts", "depth"):
            nested = {"text_config": {key: 10**7}}
            with pytest.raises(CheckpointError, match=f"text_config.{key}=10000000"):
                config.refuse_absurd_counts(nested, files)
