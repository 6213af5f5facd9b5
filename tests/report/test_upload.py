"""Uploads to a local stand-in for the Hub, which keeps what is committed."""

import base64
import json
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard, constants
from typer.testing import CliRunner

from moefit.cli import app
from moefit.dsmoe.remote_code import CODE
from moefit.errors import CheckpointError, ConfigError, UnsupportedModelError
from moefit.evaluate.loading import load_full_model
from moefit.report import upload
from moefit.report.facts import Measurements, gather
from moefit.report.upload import files_of, push
from moefit.report.write import write_page

# huggingface_hub's own, where it sends files to its former storage.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_" + "x" * 30


class _Hub(BaseHTTPRequestHandler):
    """The Hub's paths that an upload requests."""

    committed: dict[str, dict[str, bytes]]  # by repository
    stored: dict[str, bytes]  # large files by digest
    private: dict[str, bool]

    def log_message(self, format, *args):
        """Log nothing."""

    def do_POST(self):
        """Create a repository, say how files are uploaded, or commit."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.private[name] = asked.get("private") or asked.get("visibility") == "private"
            self._answer({"url": f"{self._root()}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self._root()}/store/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        else:
            self._commit(path, [json.loads(line) for line in body.splitlines()])

    def do_GET(self):
        """List a repository's files."""
        path = self.path.partition("?")[0]
        name = "/".join(path.split("/")[3:5])
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" or "/tree/" not in path:
            self._answer({"error": "Invalid credentials"}, 401)
            return
        files = self.committed.get(name, {})
        self._answer([{"type": "file", "path": one, "size": 1, "oid": "0" * 40} for one in files])

    def do_PUT(self):
        """Store a large file."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.stored[self.path.rpartition("/")[2]] = body
        self._answer({})

    def _commit(self, path, lines):
        name = "/".join(path.split("/")[3:5])
        files = self.committed.setdefault(name, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
                assert sha256(files[value["path"]]).hexdigest() == value["oid"]
        url = f"{self._root()}/{name}/commit/{'a' * 40}"
        self._answer({"success": True, "commitOid": "a" * 40, "commitUrl": url, "hookOutput": ""})

    def _root(self):
        return f"http://{self.headers['Host']}"

    def _answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    """The stand-in's class, with its address."""
    kind = type("Hub", (_Hub,), {"committed": {}, "stored": {}, "private": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    kind.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # xet's servers are another protocol
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield kind
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def page(run_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_page([gather(str(run_folder), Measurements(max_tokens=0))], folder, "apache-2.0")
    return folder


def test_model_tokenizer_card_and_code_are_committed(hub, run_folder, page, tmp_path):
    (run_folder / "trainer.pt").write_bytes(b"state")
    address = push(run_folder, "me/model", page=page, private=True, endpoint=hub.address)
    assert address.startswith(f"{hub.address}/me/model/commit/") and hub.private["me/model"]
    files = hub.committed["me/model"]
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    expected |= {"tokenizer_config.json", CODE, "README.md", "index.html"}
    assert files.keys() == expected | {"training.png", "plan.png"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert ModelCard.load(tmp_path / "README.md").data.license == "apache-2.0"
    model, _ = load_full_model(str(tmp_path))
    own, _ = load_full_model(str(run_folder))
    pairs = zip(model.parameters(), own.parameters(), strict=True)
    assert all(one.equal(other) for one, other in pairs)
    assert "auto_map" in json.loads(files["config.json"])
    assert "auto_map" not in json.loads((run_folder / "config.json").read_text())


def test_stock_models_get_no_code(hub, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    push(tmp_path, "me/olmoe", endpoint=hub.address)
    assert hub.committed["me/olmoe"].keys() == {"config.json", "model.safetensors"}


def test_weights_of_an_earlier_upload_are_replaced(hub, tmp_path):
    """A reader would follow the old index otherwise; files in folders are not the model's."""
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (tmp_path / name).write_bytes(b"12345678")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    push(tmp_path, "me/olmoe", endpoint=hub.address)
    hub.committed["me/olmoe"] |= {"onnx/a.safetensors": b"", "notes.txt": b""}
    for file in tmp_path.glob("model*"):
        file.unlink()
    (tmp_path / "model.safetensors").write_bytes(b"new")
    push(tmp_path, "me/olmoe", endpoint=hub.address)
    files = hub.committed["me/olmoe"]
    kept = {"config.json", "onnx/a.safetensors", "notes.txt"}
    assert files.keys() == kept | {"model.safetensors"}
    assert files["model.safetensors"] == b"new"


def test_refused(hub, run_folder, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="cannot name a repository"):
        push(run_folder, "a/b/c", endpoint=hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 30)
    with pytest.raises(CheckpointError, match=r"401.*hf auth login"):
        push(run_folder, "me/model", endpoint=hub.address)
    assert not hub.committed
    with pytest.raises(CheckpointError, match="uploading to me/model failed: ConnectE") as refused:
        push(run_folder, "me/model", endpoint="http://127.0.0.1:1")
    assert "auth login" not in str(refused.value)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UnsupportedModelError, match="is a GGUF file"):
        files_of(tmp_path / "model.gguf", None)


def test_the_command(hub, run_folder, page, monkeypatch):
    address = hub.address
    monkeypatch.setattr(upload, "HfApi", lambda endpoint: upload_api(address))
    done = CliRunner().invoke(app, ["push", str(run_folder), "me/model"])
    assert done.exit_code == 0, done.output
    assert "README.md" not in hub.committed["me/model"]
    done = CliRunner().invoke(app, ["push", str(run_folder), "me/model", "--report", str(page)])
    assert done.exit_code == 0, done.output
    for file in ("README.md", "index.html"):
        text = hub.committed["me/model"][file].decode()
        assert "moefit serve me/model" in text and "moefit eval me/model --rule dense" in text
        assert "moefit serve me/model" not in (page / file).read_text()


def upload_api(address):
    from huggingface_hub import HfApi

    return HfApi(endpoint=address)
