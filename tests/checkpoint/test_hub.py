"""Downloads from a local imitation of the Hub: small files, checks, then shards."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tiny_served import saved, tiny, tokens
from transformers import LlamaConfig, LlamaForCausalLM

from moefit import api
from moefit.checkpoint.hub import download
from moefit.checkpoint.safetensors import INDEX, SINGLE
from moefit.errors import CheckpointError, MoefitError, UnsupportedModelError
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import refuse_unservable
from moefit.serve.load import load_model

NAME, COMMIT = "maker/model", "a" * 40


class _Hub(BaseHTTPRequestHandler):
    """The Hub's paths that downloads request."""

    folder: Path
    fetched: list[str]

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        """Respond as to GET, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Respond with the repository, its tree, or a file."""
        path = self.path.partition("?")[0]
        files = {
            str(one.relative_to(self.folder)): one
            for one in sorted(self.folder.rglob("*"))
            if one.is_file()
        }
        if path.startswith(f"/api/models/{NAME}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": one.stat().st_size, "oid": "0" * 40}
                for name, one in files.items()
            ]
            self._answer(json.dumps(tree).encode())
        elif path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in files]
            facts = {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings}
            self._answer(json.dumps(facts).encode())
        elif path.startswith(f"/{NAME}/resolve/") and path.split("/", 5)[5] in files:
            name = path.split("/", 5)[5]
            if self.command == "GET":
                self.fetched.append(name)
            self._answer(files[name].read_bytes())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The server's address, and the files that were fetched."""
    fetched: list[str] = []
    kind = type("Hub", (_Hub,), {"folder": folder, "fetched": fetched})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with unrelated files."""
    made = tmp_path / "repository"
    tiny("Olmoe").save_pretrained(made, max_shard_size="20KB")
    assert (made / INDEX).is_file()
    more = (
        "original/config.json", "original/model.safetensors", "consolidated.safetensors",
        "pytorch_model.bin", "trainer_state.json", "optimizer.pt", "extra.safetensors", "README.md",
        "checkpoint-100/model.safetensors",
    )  # fmt: skip
    for name in more:
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text("{}")
    return made


def fetch(folder: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    with hub(folder) as (address, fetched):
        try:
            where = tmp_path / "cache"
            return download(NAME, refuse_unservable, endpoint=address, cache_dir=where), fetched
        except MoefitError:
            assert not [name for name in fetched if not name.endswith(".json")], fetched
            raise


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_config_is_downloaded_before_shards(folder: Path, tmp_path: Path) -> None:
    found, fetched = fetch(folder, tmp_path)
    shards = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    first = len(fetched) - len(shards)
    assert set(fetched[first:]) == shards
    assert set(fetched[:first]) == {"config.json", "generation_config.json", INDEX}
    with load_model(found, LoadSettings()) as served:
        assert served.model(tokens(1, 3)).logits.isfinite().all()


def test_a_model_in_one_file(tmp_path: Path) -> None:
    found, fetched = fetch(saved(tiny("Mixtral"), tmp_path / "repository"), tmp_path)
    assert fetched[-1] == SINGLE and (found / SINGLE).is_file()


def test_quantised_models_raise_before_download(folder: Path, tmp_path: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "hqq"})
    with pytest.raises(UnsupportedModelError, match=r"is quantised \(hqq\)"):
        fetch(folder, tmp_path)


def test_parts_of_unknown_formats_in_the_index_raise(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    name = next(name for name in index["weight_map"] if "q_proj" in name)
    index["weight_map"][f"{name}.absmax"] = index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UnsupportedModelError, match=r"bitsandbytes.*q_proj.weight.absmax"):
        fetch(folder, tmp_path)


def test_model_without_experts_raises(tmp_path: Path) -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=4, vocab_size=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "repository")
    with pytest.raises(UnsupportedModelError, match="has no experts"):
        fetch(tmp_path / "repository", tmp_path)


def test_adapter_raises(tmp_path: Path) -> None:
    made = tmp_path / "repository"
    made.mkdir()
    (made / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    (made / "adapter_model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(UnsupportedModelError, match=r"is an adapter \(LoRA\) of 'a/b'"):
        fetch(made, tmp_path)


@pytest.mark.parametrize("name", ["model-Q4_K_M.gguf", "pytorch_model.bin"])
@pytest.mark.parametrize("configured", [True, False])
def test_unsupported_weights_raise(tmp_path: Path, name: str, configured: bool) -> None:
    made = saved(tiny("Mixtral"), tmp_path / "repository")
    (made / SINGLE).rename(made / name)
    if not configured:
        (made / "config.json").unlink()
    with pytest.raises(CheckpointError, match=rf"on the Hub has {name}"):
        fetch(made, tmp_path)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", 7])
def test_index_with_outside_path_raises(folder: Path, tmp_path: Path, shard: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(CheckpointError, match=r"names .* is no (safetensors )?file|has 7 where"):
        fetch(folder, tmp_path)


def test_missing_shard_raises(folder: Path, tmp_path: Path) -> None:
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    with hub(folder) as (address, _), pytest.raises(CheckpointError, match="lacks 1 of the"):
        download(NAME, refuse_unservable, endpoint=address, cache_dir=tmp_path / "cache")


def test_hub_name_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []
    monkeypatch.setattr(api, "download", lambda name, refuse: asked.append(name) or tmp_path)
    assert api.folder_of(NAME) == tmp_path and asked == [NAME]
