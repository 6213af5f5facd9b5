"""API keys from a file: read again when it changes, and never shown."""

import hashlib
import os
from pathlib import Path

import pytest
from engines import running
from hypothesis import given
from hypothesis import strategies as st
from serving_http import client_of, error_of, fake_service

from moefit.errors import ConfigError
from moefit.server.middleware import ServerSettings
from moefit.server.operation.keys import Keys, parse_keys, read_keys, readable_by_others
from moefit.server.service import Service

SECRET = "sk-51f0aa77"
ALICE = f"keys:\n- {{name: alice, key: {SECRET}, operator: true}}\n"
BOB = "- {name: bob, key: bobs, requests: 2, tokens_per_minute: 600}\n"


def names(keys: Keys) -> list[str]:
    return [key.name for key in keys.all]


def test_file_of_keys(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"carols").hexdigest()
    (tmp_path / "keys").write_text(f"{ALICE}{BOB}- {{name: carol, sha256: {digest}}}\n")
    keys = Keys("flag", tmp_path / "keys")
    assert names(keys) == ["api-key", "alice", "bob", "carol"]
    for given_key, name in ((SECRET, "alice"), ("bobs", "bob"), ("carols", "carol")):
        found = keys.find(f"Bearer {given_key}")
        assert found is not None and found.name == name
        assert keys.find(f"Basic {given_key}") is None and keys.find(given_key) is None
    alice, flag = keys.client(f"bearer  {SECRET} "), keys.client("Bearer flag")
    assert alice is not None and alice.operator and flag is not None and flag.operator
    bob = keys.client("Bearer bobs")
    assert bob is not None and not bob.operator
    assert keys.client(None) is None and keys.client("Bearer ") is None
    assert (keys.by_name()["bob"].requests, keys.by_name()["bob"].tokens_per_minute) == (2, 600)


def test_key_of_the_command_line_keeps_its_rights(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(ALICE)
    with pytest.raises(ConfigError, match="'alice' is the key of --api-key"):
        Keys(SECRET, tmp_path / "keys")
    (tmp_path / "keys").write_text("keys:\n" + BOB)
    keys = Keys(SECRET, tmp_path / "keys")
    (tmp_path / "keys").write_text(ALICE)
    assert "is the key of --api-key" in keys.reload()
    client = keys.client(f"Bearer {SECRET}")
    assert client is not None and client.operator


BROKEN = [
    ("keys: [{name: a, key: b, tokens_per_minute: 1" + 40 * "0" + "}]", "less than or equal"),
    ("", "keys"),
    ("keys: []", "at least 1"),
    (ALICE + ALICE.split("\n")[1], "name 'alice'"),
    (ALICE + f"- {{name: bob, key: {SECRET}}}", "same key"),
    (ALICE.replace("alice", "api-key"), "name 'api-key'"),
    (ALICE.replace("alice", "'a b'"), "keys.0.name"),
    (ALICE.replace("name: alice, ", ""), "keys.0.name"),
    (ALICE.replace("operator", SECRET), "keys.0 has a field"),
    (ALICE.replace("true", f"'{SECRET}'"), "keys.0.operator"),
    (ALICE.replace("key: ", f"sha256: {SECRET}, key: "), "either"),
    (ALICE.replace("key:", "sha256:"), "64 hexadecimal"),
    (ALICE.replace(SECRET, f"'{SECRET} '"), "spaces"),
    (ALICE.replace(SECRET, "''"), "empty"),
    (ALICE.replace(SECRET, "12345678"), "keys.0.key"),
    (ALICE.replace(SECRET, f"*{SECRET}"), "line 2"),
    (ALICE.replace(SECRET, f"%{SECRET}"), "line 2"),
    (ALICE + BOB.replace("600", "0"), "keys.1.tokens_per_minute"),
    (f"{SECRET}: {SECRET}", "keys: Field required"),
    (ALICE.replace("operator: true", f"name: {SECRET}"), "a field occurs twice, in line 2 and 2"),
    (f"{ALICE}{SECRET}: 1\n{SECRET}: 2", "a field occurs twice, in line"),
    (f"{ALICE}{SECRET}: 1", "the file has a field"),
    (SECRET, "the file"),
]


@pytest.mark.parametrize(("text", "words"), BROKEN)
def test_mistakes_are_named_without_keys(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_keys(tmp_path / "keys")
    assert words in str(caught.value) and SECRET not in str(caught.value)
    chain: BaseException | None = caught.value
    while chain is not None and not chain.__suppress_context__:
        chain = chain.__cause__ or chain.__context__
        assert chain is None or SECRET not in str(chain)


@given(st.text())
def test_any_text_is_keys_or_an_error(text: str) -> None:
    try:
        assert parse_keys(text)
    except ConfigError as error:
        assert len(str(error)) < 500


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_text(ALICE + "#" * (1 << 20))
    for name in ("pipe", "binary", "large", "absent", ""):
        with pytest.raises(ConfigError, match="keys-file"):
            read_keys(tmp_path / name)


def test_file_is_read_again_after_changes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(ALICE)
    keys = Keys(None, path)
    assert not keys.changed()
    path.write_text(ALICE + BOB)
    assert keys.changed()
    assert keys.reload().endswith("2 in force, added bob") and not keys.changed()
    (tmp_path / "other").write_text(ALICE.replace(SECRET, "other"))
    os.replace(tmp_path / "other", path)  # as editors and secret stores do
    assert keys.changed()
    assert keys.reload().endswith("1 in force, removed bob, changed alice")
    assert keys.find(f"Bearer {SECRET}") is None and keys.find("Bearer other") is not None
    assert keys.reloads == {"ok": 2, "failed": 0}


@pytest.mark.parametrize("how", ["broken", "empty", "absent", "folder"])
def test_broken_file_changes_nothing(tmp_path: Path, how: str) -> None:
    path = tmp_path / "keys"
    path.write_text(ALICE)
    keys = Keys(None, path)
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "absent":
        path.write_text("" if how == "empty" else ALICE + "- {")
    assert keys.changed()
    said = keys.reload()
    assert said.startswith("warning: ") and "the 1 keys before it stay in force" in said
    assert keys.find(f"Bearer {SECRET}") is not None and keys.reloads["failed"] == 1
    assert not keys.changed(), "said once"
    if how == "folder":
        path.rmdir()
    path.write_text(BOB.replace("- ", "keys: [") + "]")
    assert keys.changed() and "added bob" in keys.reload()


def test_settings_read_the_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(ALICE)
    ServerSettings(name="m", keys_file=tmp_path / "keys").check()
    with pytest.raises(ConfigError, match="cannot be read"):
        ServerSettings(name="m", keys_file=tmp_path / "none").check()
    (tmp_path / "keys").chmod(0o644)
    assert readable_by_others(tmp_path / "keys")
    (tmp_path / "keys").chmod(0o640)
    assert not readable_by_others(tmp_path / "keys") and not readable_by_others(tmp_path / "no")


def test_keys_of_a_server(served, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(ALICE + BOB)
    asked = {"prompt": "import os", "max_tokens": 2}
    bob, alice = ({"Authorization": f"Bearer {key}"} for key in ("bobs", SECRET))
    with fake_service(served, keys_file=path) as (service, engine), client_of(service) as client:
        error_of(client.post("/v1/completions", json=asked), 401)
        for headers in (bob, alice):
            assert client.post("/v1/completions", json=asked, headers=headers).status_code == 200
        salts = [sampling.cache_salt for _, sampling in engine.submitted]
        assert len(set(salts)) == 2 and "" not in salts, "keys share no prefixes"
        refused = client.post("/v1/memory", json={"mode": "exact"}, headers=bob)
        assert error_of(refused, 403)["code"] == "not_operator"
        assert client.get("/v1/memory", headers=bob).status_code == 200
        assert client.post("/v1/memory", json={}, headers=alice).status_code == 400
        path.write_text(ALICE)
        service.keys.reload()
        error_of(client.post("/v1/completions", json=asked, headers=bob), 401)
        page = client.get("/metrics", headers=alice).text
        path.write_text(ALICE + BOB)
        service.keys.reload()
        others = client.get("/metrics", headers=bob).text
        assert "moefit:process_bytes" in others and "alice" not in others
    assert (
        'moefit:key_requests_total{key="alice",model_name="reference",outcome="accepted"} 1' in page
    )
    assert SECRET not in page and 'key="bob"' not in page
    assert 'moefit:key_file_reloads_total{model_name="reference",result="ok"} 1' in page


def test_keys_reuse_no_prefixes_of_each_other(served, tmp_path: Path) -> None:
    path, before = tmp_path / "keys", served.tokenizer.chat_template
    path.write_text(ALICE + BOB)
    served.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    prompt = "import os\n" * 20
    asked = {
        "/v1/completions": {"prompt": prompt, "max_tokens": 2},
        "/v1/chat/completions": {
            "messages": [{"role": "user", "content": prompt}], "max_tokens": 2, "cache_salt": "s",
        },
        "/v1/responses": {"input": "x" + prompt, "max_output_tokens": 2},
    }  # fmt: skip
    settings = ServerSettings(name="reference", keys_file=path)
    with running(served, max_model_len=400) as engine:
        service = Service(engine, settings)
        with client_of(service) as client:
            for url, body in asked.items():
                cached = []
                for key in (SECRET, "bobs", SECRET, "bobs"):
                    headers = {"Authorization": f"Bearer {key}"}
                    usage = client.post(url, json=body, headers=headers).json()["usage"]
                    details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
                    cached.append(details["cached_tokens"])
                assert cached[:2] == [0, 0] and cached[2] == cached[3] > 16, url
        service.close()
    served.tokenizer.chat_template = before
