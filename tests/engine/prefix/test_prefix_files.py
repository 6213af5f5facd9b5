"""Prefixes survive a restart: the same bits in answers, whatever happens to the files."""

import logging
import threading
from time import monotonic

import pytest
import torch
from engines import Heard, ask, greedy, running, text
from levels import compiled
from tiny_families import tiny_family
from tiny_served import saved, tiny

from moefit.engine.api import EngineSettings, TokenEvent
from moefit.engine.engine import Engine
from moefit.engine.prefix import files
from moefit.engine.prefix.files import fingerprint_of
from moefit.engine.prefix.store import PrefixStore
from moefit.engine.prefix.tree import Prefix
from moefit.errors import ConfigError
from moefit.quant.library import VERSION
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model

pytestmark = compiled
PROMPT = text(210)
WIDER = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
LATENTS = {
    "intermediate_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 32,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tiny("Olmoe", **WIDER), tmp_path_factory.mktemp("olmoe"))


@pytest.fixture(scope="module", params=["model", "int8", "latents"])
def served(folder, request, tmp_path_factory):
    kv_cache = request.param
    if kv_cache == "latents":
        model, kv_cache = tiny("DeepseekV3", **LATENTS), "model"
        folder = saved(model, tmp_path_factory.mktemp("deepseek"))
    settings = LoadSettings(context=512, dtype=torch.bfloat16, kv_cache=kv_cache)
    with load_model(folder, settings) as served:
        served.model.generation_config.eos_token_id = None
        yield served


def answer(engine: Engine, prompt=PROMPT, **more) -> Heard:
    return ask(engine, prompt, greedy(8, logprobs=0, **more)).wait()


def bits(heard: Heard) -> list[float]:
    made = [event for event in heard.events if isinstance(event, TokenEvent)]
    assert made and heard.end.reason == "length"
    return [number for event in made for number in (event.token, event.logprob.logprob)]


def test_answers_after_a_restart(served, tmp_path) -> None:
    with running(served, prefix_cache="off") as engine:
        expected = bits(answer(engine))
    with running(served, prefix_folder=tmp_path) as engine:
        first = answer(engine)
        assert first.end.cached_tokens == 0 and bits(first) == expected
        assert engine._prefixes.settle(10)
        assert engine.stats().prefix_files.written == 192
    with running(served, prefix_folder=tmp_path) as engine:
        assert engine.stats().prefixes.tokens == 0
        again = answer(engine)
        assert again.end.cached_tokens == 192 and bits(again) == expected
        assert engine.stats().prefix_files.read == 192
        assert engine.stats().prefixes.hits == 192
        assert answer(engine).end.cached_tokens == 208, "now in memory"
        files = engine.stats().prefix_files
        assert files.files == 3 and files.bytes < files.limit
        assert answer(engine, cache_salt="other").end.cached_tokens == 0


def test_closing_saves_what_is_waiting(served, tmp_path) -> None:
    for cached in (0, 192):
        with running(served, prefix_folder=tmp_path) as engine:
            assert answer(engine).end.cached_tokens == cached


def test_damage_ends_a_prefix(served, tmp_path, caplog) -> None:
    with running(served, prefix_folder=tmp_path) as engine:
        expected = bits(answer(engine))
    paths = sorted(tmp_path.glob("*/*.kv"))
    for path in paths:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with running(served, prefix_folder=tmp_path) as engine, caplog.at_level(logging.WARNING):
        again = answer(engine)
        assert again.end.cached_tokens == 0 and bits(again) == expected
        assert caplog.text.count("does not match its checksum") == 1
        assert engine._prefixes.settle(10) and engine.stats().prefix_files.damaged == 1


def test_other_requests_run_while_files_are_read(served, tmp_path, monkeypatch) -> None:
    with running(served, prefix_folder=tmp_path) as engine:
        expected = bits(answer(engine))
    go, read = threading.Event(), PrefixStore.read

    def slow(self, *arguments):
        assert go.wait(30)
        return read(self, *arguments)

    monkeypatch.setattr(PrefixStore, "read", slow)
    with running(served, prefix_folder=tmp_path) as engine:
        waits = ask(engine, PROMPT, greedy(8, logprobs=0))
        gone = ask(engine, PROMPT, greedy(8, logprobs=0))
        assert answer(engine, text(20)).end.reason == "length"
        assert not waits.events
        engine.cancel("request-2")
        assert gone.wait().end.reason == "cancelled"
        go.set()
        assert waits.wait().end.cached_tokens == 192 and bits(waits) == expected
        assert engine._prefixes.settle(10)


def test_states_of_modes_that_depend_on_residents_are_not_written(served, tmp_path) -> None:
    with running(served, prefix_folder=tmp_path, prefix_cache="on") as engine:
        engine.set_mode("virtual")
        answer(engine)
        assert engine._prefixes.settle(10) and engine.stats().prefix_files.files == 0
        engine.set_mode("exact")


def test_a_limit_below_one_file_is_refused(served, tmp_path, caplog) -> None:
    with pytest.raises(ConfigError, match=r"disk 1.00 KiB holds no file of 64 tokens.* at least"):
        Engine(served, EngineSettings(prefix_folder=tmp_path, prefix_disk_bytes=1024))
    most = {"prefix_folder": tmp_path, "prefix_disk_bytes": 1 << 60}
    with caplog.at_level(logging.WARNING), running(served, **most):
        assert "are free on its disk" in caplog.text


def test_other_models_and_kernels_have_other_fingerprints(folder, tmp_path, monkeypatch) -> None:
    changed = tiny("Olmoe", **WIDER)
    with torch.no_grad():
        changed.model.layers[0].self_attn.k_proj.weight[3, 3] += 0.5
    names = set()
    for where, kv_cache in (
        (folder, "model"), (folder, "int8"), (saved(changed, tmp_path), "model"), (folder, "model"),
    ):  # fmt: skip
        with load_model(where, LoadSettings(context=256, kv_cache=kv_cache)) as served:
            pool = Engine(served)._runner.cache.pool
            names.add(fingerprint_of(served, pool))
            if len(names) == 3:
                monkeypatch.setattr(files, "VERSION", VERSION + 1)
                assert fingerprint_of(served, pool) not in names
                monkeypatch.undo()
    assert len(names) == 3


def test_a_failed_engine_does_not_delay_its_end(served, tmp_path) -> None:
    engine = Engine(served, EngineSettings(prefix_folder=tmp_path))
    engine.start()
    engine._fail("out of memory")
    engine._prefixes._files._disk.save(Prefix(namespace="n", tokens=PROMPT, durable=True))
    began = monotonic()
    engine.close()
    assert monotonic() - began < 2


def test_encoded_dense_weights_have_other_fingerprints(tmp_path) -> None:
    wide = {**WIDER, "hidden_size": 64, "intermediate_size": 64}
    changed = tiny("Olmoe", **wide)
    with torch.no_grad():
        changed.model.layers[0].self_attn.k_proj.weight[3, 3] += 0.5
    folders = saved(tiny("Olmoe", **wide), tmp_path / "a"), saved(changed, tmp_path / "b")
    names = []
    for where, precision in ((folders[0], "int8"), (folders[1], "int8"), (folders[0], "int4")):
        for _ in range(2):
            settings = LoadSettings(context=256, dense_precision=precision)
            with load_model(where, settings) as served:
                names.append(fingerprint_of(served, Engine(served)._runner.cache.pool))
    assert names[::2] == names[1::2] and len(set(names)) == 3


def test_caches_of_their_own_have_no_files(tmp_path) -> None:
    folder = saved(tiny_family("qwen3_next"), tmp_path / "model")
    with load_model(folder, LoadSettings(context=256)) as served:
        served.model.generation_config.eos_token_id = None
        with running(served, prefix_folder=tmp_path / "cache") as engine:
            assert answer(engine, PROMPT[:40]).end.reason == "length"
            assert engine.stats().prefix_files is None
