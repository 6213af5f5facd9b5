"""`moefit serve`, `budget` and `chat`: options from all sources, and a server process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving_http import fake_service
from tiny_served import saved, tiny
from typer.testing import CliRunner

import moefit
from moefit.cli import app, chat, serve
from moefit.cli.options import read_options
from moefit.errors import BudgetTooSmallError, ConfigError
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel
from moefit.server.client import Client
from moefit.server.run import HttpServer, bind, url_of

RUNNER = CliRunner()


@pytest.fixture
def given(monkeypatch) -> list[tuple[Any, ...]]:
    """Return the arguments of `serve` instead of serving."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(serve, "_serve", lambda *arguments: calls.append(arguments))
    return calls


def test_serve_defaults(given) -> None:
    assert RUNNER.invoke(app, ["serve"]).exit_code == 0
    ((model, options, engine, settings, follow, following, warm),) = given
    assert following["generation_config"] == "auto" and not follow.follows and warm is None
    assert options.prefetch == "off"
    assert (model, options.memory, options.context) == ("reference", None, 2048)
    assert (engine.max_concurrency, engine.max_model_len) == (16, None)
    assert not engine.deterministic
    assert (engine.prefix_cache, engine.prefix_folder) == ("auto", None)
    assert (settings.host, settings.port, settings.name) == ("127.0.0.1", 8000, "reference")
    assert (settings.api_key, settings.origins) == (None, ())


def test_prefix_cache_options(given, tmp_path: Path) -> None:
    options = ["--prefix-cache-dir", str(tmp_path), "--prefix-cache-disk", "2GiB"]
    for more in ([], ["--prefix-cache", "off"], options, ["--prefix-cache", "on", *options[:2]]):
        assert RUNNER.invoke(app, ["serve", *more]).exit_code == 0
    engines = [call[2] for call in given]
    assert [one.prefix_cache for one in engines] == ["auto", "off", "auto", "on"]
    assert [one.prefix_folder for one in engines] == [None, None, tmp_path, tmp_path]
    assert [one.prefix_disk_bytes >> 30 for one in engines[2:]] == [2, 8]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prefix-cache-disk", "2GiB"], "give --prefix-cache-dir too"),
        (["--prefix-cache-dir", "d", "--prefix-cache", "off"], "no effect"),
        (["--prefix-cache-dir", "d", "--prefix-cache-disk", "big"], "is not a size"),
        (["--prefix-cache-dir", ""], "name a folder for prefixes"),
    ],
)
def test_prefix_files_that_are_not_used_raise(given, arguments: list[str], says: str) -> None:
    error = RUNNER.invoke(app, ["serve", *arguments]).exception
    assert isinstance(error, ConfigError) and says in str(error)


def test_warm_start_is_for_budgets_and_unless_requested_for_exact_mode(tmp_path: Path) -> None:
    folder = saved(tiny("Mixtral"), tmp_path)
    with load_model(folder, LoadSettings(context=64, memory="4GiB")) as served:
        assert serve._starts_warm(served, None) and not serve._starts_warm(served, False)
        served.set_mode("exact", prefill="virtual")
        assert not serve._starts_warm(served, None) and serve._starts_warm(served, True)
        served.set_mode("bounded")
        assert not serve._starts_warm(served, None)
    with load_model(folder, LoadSettings(context=64)) as served:
        assert not serve._starts_warm(served, None) and not serve._starts_warm(served, True)


def test_memory_auto_begins_with_what_is_free(given) -> None:
    arguments = ["--memory", "auto", "--memory-max", "1GiB", "--memory-headroom", "64MiB"]
    assert RUNNER.invoke(app, ["serve", *arguments]).exit_code == 0
    ((_, options, _, _, follow, _, _),) = given
    assert (follow.follows, follow.least, follow.most, follow.headroom) == (
        True, None, 1 << 30, 64 << 20,
    )  # fmt: skip
    assert int(options.memory) <= 1 << 30


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--memory-min", "2GiB", "--memory-max", "1GiB"], "is larger than --memory-max"),
        (["serve", "--memory", "auto", "--max-loss", "3%"], "without a plan"),
        (["serve", "--memory-headroom", "1GiB", "--plan", "plan.json"], "without a plan"),
        (["generate", "reference", "some", "--memory", "auto"], "it is for moefit serve"),
    ],
)
def test_memory_auto_raises_where_it_cannot_be(given, arguments: list[str], says: str) -> None:
    error = RUNNER.invoke(app, arguments).exception
    assert isinstance(error, ConfigError) and says in str(error)


def test_headroom_may_be_nothing(given) -> None:
    assert RUNNER.invoke(app, ["serve", "--memory-headroom", "0"]).exit_code == 0
    assert given[0][4].headroom == 0


def test_too_little_free_memory_is_explained() -> None:
    settings = serve.FollowSettings(follows=True, least=None, most=None, headroom=1 << 30)
    with (
        pytest.raises(BudgetTooSmallError, match=r"1.00 GiB stay free .*; below"),
        settings.explained(),
    ):
        raise BudgetTooSmallError("below")


def test_precedence_of_flag_variable_and_file(given, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: from-file\nport: 1\nmemory: 1GiB\nmax-concurrency: 3\nmode: virtual\n"
        "cors_origin: [https://a.example, https://b.example]\nhost: ::1\napi_key: file\n"
        "generation-config: none\ndeterministic: true\nwarm-start: false\n"
    )
    environment = {"MOEFIT_PORT": "2", "MOEFIT_MEMORY": "2GiB", "MOEFIT_API_KEY": "variable"}
    done = RUNNER.invoke(app, ["serve", "--config", str(file), "--port", "3"], env=environment)
    assert done.exit_code == 0, done.output
    ((model, options, engine, settings, _, following, warm),) = given
    assert following["generation_config"] == "none" and warm is False
    assert (settings.port, options.memory, settings.api_key) == (3, "2GiB", "variable")
    assert (model, engine.max_concurrency, options.mode) == ("from-file", 3, "virtual")
    assert engine.deterministic
    assert settings.origins == ("https://a.example", "https://b.example")
    assert settings.host == "::1"
    named = {"MOEFIT_CONFIG": str(file), "MOEFIT_MODEL": "other"}
    assert RUNNER.invoke(app, ["serve"], env=named).exit_code == 0
    assert given[1][0] == "other" and given[1][3].port == 1


def test_every_option_has_environment_variable(given) -> None:
    environment = {
        "MOEFIT_MEMORY": "3GiB", "MOEFIT_HOST_MEMORY": "1GiB", "MOEFIT_MODE": "bounded",
        "MOEFIT_PREFILL": "bounded", "MOEFIT_BOUND": "0.2", "MOEFIT_PRECISION": "int4",
        "MOEFIT_DENSE_PRECISION": "int8", "MOEFIT_CONTEXT": "99", "MOEFIT_DEVICE": "cuda",
        "MOEFIT_SERVED_MODEL_NAME": "me", "MOEFIT_MAX_MODEL_LEN": "50", "MOEFIT_MAX_WAITING": "5",
        "MOEFIT_PREFILL_CHUNK": "7", "MOEFIT_CHAT_TOKENS": "9", "MOEFIT_MAX_CONNECTIONS": "4",
        "MOEFIT_DRAIN_SECONDS": "1.5", "MOEFIT_CORS_ORIGIN": "https://a.example",
        "MOEFIT_GENERATION_CONFIG": "none", "MOEFIT_DETERMINISTIC": "1",
        "MOEFIT_WARM_START": "false", "MOEFIT_PREFIX_CACHE": "on", "MOEFIT_PREFIX_CACHE_DIR": "d",
        "MOEFIT_PREFIX_CACHE_DISK": "1GiB", "MOEFIT_CONTEXT_MAX": "400",
    }  # fmt: skip
    assert RUNNER.invoke(app, ["serve"], env=environment).exit_code == 0
    ((_, options, engine, settings, _, following, warm),) = given
    assert following["generation_config"] == "none" and warm is False
    assert (options.memory, options.host_memory, options.mode) == ("3GiB", "1GiB", "bounded")
    assert (options.prefill, options.bound, options.precision) == ("bounded", 0.2, "int4")
    assert (options.dense, options.context, options.device) == ("int8", 99, "cuda")
    assert (engine.max_model_len, engine.max_waiting, engine.prefill_chunk) == (50, 5, 7)
    assert engine.deterministic and engine.prefix_cache == "on" and engine.context_max == 400
    assert (engine.prefix_folder, engine.prefix_disk_bytes) == (Path("d"), 1 << 30)
    assert (settings.name, settings.chat_tokens, settings.connections) == ("me", 9, 4)
    assert (settings.drain_seconds, settings.origins) == (1.5, ("https://a.example",))


@pytest.mark.parametrize("key", ["a b", "schlüssel", "a\n"])
def test_api_key_with_unsafe_characters_raises(given, key: str) -> None:
    done = RUNNER.invoke(app, ["serve", "--api-key", key])
    assert done.exit_code != 0 and given == []
    assert "openssl rand" in str(done.exception) and key not in str(done.exception)


def test_empty_api_key_raises(given, tmp_path: Path) -> None:
    """An unset shell variable would leave the server without authentication."""
    file = tmp_path / "serve.yaml"
    file.write_text("api_key: ''\n")
    for empty in (["--api-key", ""], ["--config", str(file)]):
        done = RUNNER.invoke(app, ["serve", *empty])
        assert done.exit_code != 0 and given == []
        assert "is empty" in str(done.exception)
    assert RUNNER.invoke(app, ["serve"], env={"MOEFIT_API_KEY": ""}).exit_code == 0
    assert given[0][3].api_key is None


def test_single_value_is_list(given, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("cors_origin: https://a.example\nserved_model_name: 7\nmax_model_len:\n")
    done = RUNNER.invoke(app, ["serve", "--config", str(file)])
    assert done.exit_code == 0, done.output
    ((_, _, engine, settings, _, _, _),) = given
    assert settings.origins == ("https://a.example",)
    assert (settings.name, engine.max_model_len) == ("7", None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("port: 80.5", "'--port'"),
        ("port: yes", "'port' is one value, but the file has True"),
        ("port: [1, 2]", "'port' is one value"),
        ("memory: {bytes: 4}", "'memory' is one value"),
        ("cors_origin: {a: b}", "'cors_origin' is one value, or a list of them"),
        ("cors_origin: [[a]]", "'cors_origin' is one value, or a list of them"),
        ("mode: fast", "'--mode'"),
        ("max_waiting: 0", "'--max-waiting'"),
        ("drain_seconds: soon", "'--drain-seconds'"),
    ],
)
def test_invalid_value_raises(given, tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    done = RUNNER.invoke(app, ["serve", "--config", str(file)], env={"COLUMNS": "300"})
    assert done.exit_code != 0 and given == []
    assert says in (done.output + str(done.exception))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot: 8000", "'port'"),
        ("- port", "port: 8000"),
        ("port: [", "not YAML"),
        ("max-concurency: 3", "'max_concurrency'"),
    ],
)
def test_invalid_config_file_raises(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_options(file, ["port", "host", "max_concurrency"])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_options(tmp_path / "none.yaml", ["port"])


def test_empty_config_file_has_no_options(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("# nothing yet\n")
    assert read_options(file, ["port"]) == {}


def test_clients_do_not_see_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert serve.public_name(str(tmp_path / "mine")) == "mine"
    assert serve.public_name("reference") == "reference"
    assert serve.public_name("allenai/OLMoE-1B-7B-0924") == "allenai/OLMoE-1B-7B-0924"


@pytest.fixture(scope="module")
def served() -> Iterator[ServedModel]:
    with moefit.load("reference", memory="4GiB") as served:
        yield served


@contextmanager
def url_of_fake(served: ServedModel, **settings: Any) -> Iterator[str]:
    bound = bind("127.0.0.1", 0)
    with fake_service(served, **settings) as (service, _):
        running = HttpServer(service, bound)
        running.start()
        try:
            yield url_of(bound, "127.0.0.1")
        finally:
            running.stop()


def test_budget_command(served) -> None:
    with url_of_fake(served, api_key="k") as url:
        key = ["--url", url, "--api-key", "k"]
        got = RUNNER.invoke(app, ["budget", "get", *key, "--json"])
        assert json.loads(got.stdout)["budget"]["total"] == 4 << 30
        arguments = ["budget", "set", "3GiB", "--mode", "bounded", "--bound", "0.1", *key]
        table = RUNNER.invoke(app, arguments)
        assert table.exit_code == 0
        assert "reference, mode bounded" in table.stdout and "3.00 GiB" in table.stdout
        refused = RUNNER.invoke(app, ["budget", "set", "5MiB", *key])
        assert "minimum" in str(refused.exception)
        everything = RUNNER.invoke(app, ["budget", "set", "all", *key, "--json"])
        assert json.loads(everything.stdout)["budget"]["total"] is None
        stranger = RUNNER.invoke(app, ["budget", "get"], env={"MOEFIT_URL": url})
        assert "send the server's API key" in str(stranger.exception)


def test_chat_with_base_model_server(served, monkeypatch) -> None:
    with url_of_fake(served) as url:
        arguments = ["chat", "--url", url, "--max-tokens", "4", "--seed", "2"]
        done = RUNNER.invoke(app, arguments, input="import\n/what\n/quit\nnever\n")
        assert done.exit_code == 0, done.output
        asked = {"prompt": "import", "max_tokens": 4, "seed": 2}
        answer = Client(url).post("/v1/completions", asked)["choices"][0]["text"]
        assert answer.strip() in done.stdout
        wrong = RUNNER.invoke(app, ["chat", "reference", "--url", url])
        assert "one or the other" in str(wrong.exception)


class Parrot:
    """Repeat the last message; "stop" raises KeyboardInterrupt and "fail" an error."""

    name, supports_chat = "parrot", True

    def __init__(self) -> None:
        self.heard: list[list[dict[str, str]]] = []

    def generate(self, turns: Any, options: Any) -> Iterator[str]:
        self.heard.append(list(turns))
        last = turns[-1]["content"]
        yield f"{last}-"
        if last == "stop":
            raise KeyboardInterrupt
        if last == "fail":
            raise ConfigError("too long")
        yield "\x1b[31mred"


def test_chat_keeps_conversation(monkeypatch, capsys) -> None:
    parrot, lines = Parrot(), iter(["one", "stop", "fail", "two", "/new", "three"])

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    chat._talk(parrot, None, "be brief")  # pyright: ignore[reportArgumentType]
    system = {"role": "system", "content": "be brief"}
    texts = [[turn["content"] for turn in turns[1:]] for turns in parrot.heard]
    assert all(turns[0] == system for turns in parrot.heard)
    said = "\x1b[31mred"
    assert texts == [
        ["one"],
        ["one", f"one-{said}", "stop"],
        ["one", f"one-{said}", "stop", "stop-", "fail"],
        ["one", f"one-{said}", "stop", "stop-", "two"],
        ["three"],
    ]
    assert "\x1b" not in capsys.readouterr().out


def test_local_chat() -> None:
    arguments = ["chat", "reference", "--max-tokens", "4", "--temperature", "0"]
    done = RUNNER.invoke(app, arguments, input="import os\n")
    assert done.exit_code == 0, done.output
    with moefit.load("reference") as served:
        prompt = served.tokenizer("import os", return_tensors="pt", return_token_type_ids=False)
        ids = served.generate(**prompt, max_new_tokens=4, do_sample=False)
        text = served.tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
    assert text in done.stdout


@pytest.mark.slow
def test_server_process_drains_and_exits(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moefit", "serve", "--port", "0", "--memory", "4GiB"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "MOEFIT_MAX_WAITING": "7"}
    )
    assert process.stderr is not None
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if line.startswith("API at "):
                break
        client = Client(lines[-1].split()[2])
        asked = {"prompt": "import os", "max_tokens": 300, "temperature": 0, "ignore_eos": True}
        events = client.stream("/v1/completions", asked)
        next(events)
        process.send_signal(signal.SIGTERM)
        rest = list(events)
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
        assert process.wait(timeout=60) == 0
        assert "finishing running requests" in process.stderr.read()
        assert any("answer" in line and "other requests" in line for line in lines), lines
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_unservable_model_exits_without_traceback() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        done = RUNNER.invoke(app, ["serve", "--port", port])
        assert isinstance(done.exception, ConfigError) and "in use" in str(done.exception)
    for arguments in (["nowhere"], ["--memory", "5MiB"], ["--memory", "lots"], ["--port", "x"]):
        done = RUNNER.invoke(app, ["serve", "--port", "0", *arguments])
        assert done.exit_code in (1, 2), arguments
        assert done.exception is not None


def test_budget_includes_logits_of_all_requests(monkeypatch) -> None:
    loaded: list[dict[str, Any]] = []

    def load(*_: Any, **settings: Any) -> None:
        loaded.append(settings)
        raise ConfigError("enough")

    monkeypatch.setattr(serve, "load_served", load)
    RUNNER.invoke(app, ["serve", "--port", "0", "--max-concurrency", "5"])
    (how,) = loaded
    assert (how["sequences"], how["prompt_logits"]) == (5, 16 << 20)


@pytest.mark.parametrize("seconds", ["inf", "-1"])
def test_drain_timeout_ends_server(seconds: str) -> None:
    done = RUNNER.invoke(app, ["serve", "--drain-seconds", seconds])
    assert done.exit_code == 2 and "--drain-seconds" in done.stderr
