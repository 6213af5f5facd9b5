"""Requests to a model that routes by the token before: packed, in chunks, with prefixes, drafts."""

from typing import Any

import pytest
import torch
from engines import ask, greedy, paused, running
from levels import compiled
from tiny_models import tiny_model, tokens
from tiny_served import saved

from moefit.engine.api import SamplingParams
from moefit.engine.context import reservation
from moefit.engine.kv_pool import KvPool
from moefit.engine.runner_probe import choose_runner
from moefit.quant.cpu_kernels import kernels
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.memory.activations import kv_bytes_per_token
from tests.engine.speculation.test_speculation import drafting, result
from tests.engine.test_growth import CONTEXT, LONG, budgeted, text
from tests.engine.test_growth import SHAPE as GROWING

SHAPE: dict[str, Any] = {
    "pregated": "previous_token_and_embedding", "hidden_size": 64, "num_attention_heads": 2,
    "num_experts": 8, "num_hidden_layers": 3, "max_position_embeddings": 256,
    "inference_rule": "top_k:2",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_model(**SHAPE)


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    folder = saved(model, tmp_path_factory.mktemp("previous"))
    with load_model(folder, LoadSettings(context=256)) as served:
        counts = [3 for _ in served.blocks]
        served.set_memory(served.budget.total_for_slots(counts))
        served.model.generation_config.eos_token_id = None
        yield served
        served.check()


@torch.inference_mode()
def own(model: Any, prompt: list[int], new: int) -> list[int]:
    """Return the training model's greedy answer, each token from a pass over the whole text."""
    text = list(prompt)
    for _ in range(new):
        logits = model(torch.tensor([text]), use_cache=False).logits
        text.append(int(logits[0, -1].argmax()))
    return text[len(prompt) :]


def prompts(*lengths: int) -> list[list[int]]:
    return [tokens(length, seed=length).tolist() for length in lengths]


@pytest.mark.parametrize("chunk", [3, 64])
def test_a_crowd_gets_the_answers_of_the_training_model(model, served, chunk: int) -> None:
    asked = prompts(2, 13, 30, 1, 7)
    with running(served, prefill_chunk=chunk) as engine:
        assert engine.stats().runner == "packed"
        heard = []
        with paused(engine) as go:
            heard += [ask(engine, one, greedy(12)) for one in asked[:3]]
            go.set()
            heard[0].wait()
            heard += [ask(engine, one, greedy(12)) for one in asked[3:]]
        for one, prompt in zip(heard, asked, strict=True):
            assert one.wait().tokens == own(model, prompt, 12)
    assert served.prefetching.prefetcher.failure == ""


def test_one_request_at_a_time_reads_early(model, served) -> None:
    before = served.report()
    (prompt,) = prompts(9)
    with running(served) as engine:
        assert ask(engine, prompt, greedy(12)).wait().tokens == own(model, prompt, 12)
    after = served.report()
    read = after["prefetches"] - before["prefetches"]
    assert read == after["prefetches_used"] - before["prefetches_used"] > 0


@pytest.mark.parametrize("prefix_cache", ["on", "auto"])
def test_kept_prefixes_give_the_same_answers(model, served, prefix_cache: str) -> None:
    """Taken over at their place by one request and copied by others."""
    said = tokens(60, seed=4).tolist()
    texts = [[*said[:48], *tokens(n, seed=n).tolist()] for n in (5, 11)] + [said]
    expected = [own(model, one, 10) for one in texts]
    with running(served, prefix_cache=prefix_cache) as engine:
        if not engine.prefix_coverage.active:
            assert prefix_cache == "auto" and kernels() is None, engine.prefix_coverage
            pytest.skip("by itself only where kernels make answers independent of it")
        assert ask(engine, said, greedy(10)).wait().tokens == expected[2]
        with paused(engine) as go:
            heard = [ask(engine, one, greedy(10)) for one in texts]
            go.set()
            for one, answer in zip(heard, expected, strict=True):
                assert one.wait().tokens == answer and one.end.cached_tokens >= 48


@compiled
def test_drafts_change_no_answer(served) -> None:
    asked = prompts(30, 3, 17)
    sampling = [
        greedy(16, logprobs=0),
        SamplingParams(max_tokens=16, temperature=1.2, seed=5, logprobs=0),
        greedy(16, logprobs=0),
    ]
    with running(served) as engine:
        plain = [
            ask(engine, prompt, one).wait() for prompt, one in zip(asked, sampling, strict=True)
        ]
    for script in ([(30, 0)], [(0, 3)], [(3, 2), (1, 0), (0, 1), (8, 9)]):
        with drafting(served, prefill_chunk=7) as (engine, scripted):
            scripted.script = script
            for prompt, heard in zip(asked, plain, strict=True):
                scripted.answers[tuple(prompt)] = heard.tokens
            with paused(engine) as go:
                heard = [
                    ask(engine, prompt, one) for prompt, one in zip(asked, sampling, strict=True)
                ]
                go.set()
                for one, other in zip(heard, plain, strict=True):
                    assert result(one) == result(other)
            stats = engine.stats().speculation
            assert stats is not None and stats.drafted > 0


@compiled
def test_logits_move_with_a_growing_cache(tmp_path, monkeypatch) -> None:
    """While other requests run, whose tokens are moved."""
    monkeypatch.setattr(reservation, "GIVE_BACK_AFTER", 1e6)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "pregated": "previous_token"}
    model = tiny_model(**(GROWING | shape), vocab_size=64, inference_rule="top_k:2")
    wanted = [(60, 1), (LONG, 0), (90, 2)]
    expected = [own(model, text(*one), 8) for one in wanted]
    with budgeted(saved(model, tmp_path)) as served, running(served) as engine:
        heard = [ask(engine, text(*one), greedy(8)) for one in wanted]
        assert [one.wait().tokens for one in heard] == expected
        assert engine.stats().kv_tokens >= LONG + 8 > CONTEXT
        engine.check()


@torch.inference_mode()
def test_the_pool_holds_what_is_reserved_per_token(served) -> None:
    runner = choose_runner(served, 64)
    pool: KvPool = runner.cache.pool
    config = served.model.config
    assert pool.bytes_per_place == kv_bytes_per_token(config, torch.float32)
    assert pool.bytes_per_place == config.num_hidden_layers * (2 * 64 * 4 + 8 * 4)
    plain = repr([(index, None) for index in range(3)])
    assert pool.layout() != plain and pool.layout().endswith("[(0, 8), (1, 8), (2, 8)]")
    for block in range(3):
        pool.logits(block, torch.zeros(1, 8))[:] = torch.arange(64.0)[:, None] + block
    content = pool.copy_out([0, 32])
    size = pool.places.block
    pool.copy_in(size, content)
    for block in range(3):
        rows = pool.logits(block, torch.zeros(1, 8))
        assert torch.equal(rows[size : 2 * size], rows[:size])
        assert torch.equal(rows[2 * size : 3 * size, 0], torch.arange(32.0, 32 + size) + block)
    pool.check()
