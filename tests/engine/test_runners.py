"""Every family gives the same tokens through the engine as by itself."""

import pytest
import torch
from engines import ask, check_crowd, engine_of, generated, greedy, paused, prompts, running
from quick import slow_but
from tiny_families import families, tiny_family, token_ids
from tiny_models import tiny_model
from tiny_served import COMMON, FAMILIES, saved, tiny
from transformers import Cache, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.cache_utils import CacheLayerMixin

from moefit.api import load as load_by_name
from moefit.engine.api import SamplingParams
from moefit.engine.runner_probe import choose_runner
from moefit.engine.runners import RunnerInput, SeparateRunner, VarlenRunner
from moefit.errors import ConfigError, UnsupportedModelError
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from tests.serve.test_encoder_decoder_serving import nllb, switch


def qwen3_moe():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2, head_dim=8
    )
    model = Qwen3MoeForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    return model.eval()


MODELS = {
    **{family: lambda family=family: tiny(family) for family in FAMILIES},
    "Qwen3Moe": qwen3_moe,
    "sliding": lambda: tiny("Mixtral", sliding_window=5),
    "no shared keys": lambda: tiny("Olmoe", num_key_value_heads=4),
    "positions of the longest": lambda: tiny(
        "Olmoe",
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    ),
    "threshold": lambda: tiny_model(inference_rule="threshold:0.9", vocab_size=61),
    "attention experts": lambda: tiny_model(
        inference_rule="threshold:0.9", vocab_size=61, num_attention_experts=4, head_dim=8
    ),
    "rule of the batch": lambda: tiny_model(inference_rule="threshold_top_k:0.9", vocab_size=61),
    "Switch": switch,
}
SEPARATE = {"positions of the longest", "rule of the batch", "Switch"}


SLOW = {"Mixtral", "Olmoe", "GptOss", "no shared keys", "threshold"}


@pytest.mark.parametrize("name", slow_but(MODELS.keys() - SLOW, MODELS))
def test_batched_output_equals_single_output(name, tmp_path):
    folder = saved(MODELS[name](), tmp_path)
    with engine_of(folder, context=120, prefill_chunk=6, max_concurrency=4) as engine:
        assert engine.stats().runner == ("separate" if name in SEPARATE else "packed")
        engine.served.model.generation_config.eos_token_id = None
        check_crowd(engine)
        assert engine.served.model.config._attn_implementation != "moefit_packed"


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_cache_matches_estimate(family, tmp_path):
    folder = saved(tiny(family), tmp_path)
    with load_model(folder, LoadSettings(context=50)) as served:
        runner = choose_runner(served, 50)
        assert isinstance(runner, VarlenRunner)
        assert 0 < runner.cache.pool.nbytes <= served.budget.kv_cache
        runner.cache.pool.check()
        assert runner.cache.pool.places.free == 50


def held_tensors(value):
    """Return all tensors contained in a model's output."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, Cache | CacheLayerMixin):
        value = list(vars(value).values())
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in held_tensors(one)]
    return []


def held_bytes(value) -> int:
    """Return the bytes of all storages, counting shared ones once."""
    storages = [one.untyped_storage() for one in held_tensors(value)]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(20, 20), (38, 2), (2, 38)])
@pytest.mark.parametrize("family", [switch, nllb])
def test_encoder_outputs_match_estimate(family, lengths, dtype, tmp_path):
    prompt, answer = lengths
    folder = saved(family().to(dtype), tmp_path)
    settings = LoadSettings(context=40, memory="9GiB")  # without one, context is no limit
    with load_model(folder, settings) as served, torch.inference_mode():
        runner = choose_runner(served, 40)
        assert isinstance(runner, SeparateRunner)
        runner.open("one", 40)
        one = RunnerInput(request="one", tokens=[5] * prompt, past=0, num_logits=1)
        for past in range(prompt, prompt + answer):
            runner.step([one])
            one = RunnerInput(request="one", tokens=[5], past=past, num_logits=1)
        encoded = held_bytes(runner._encoded)
        assert encoded >= prompt * served.model.config.d_model * dtype.itemsize
        assert encoded + held_bytes(runner._caches) <= served.budget.kv_cache
        runner.close("one")
        assert held_tensors([runner._encoded, runner._caches]) == []


def test_steps_keep_only_kv_cache(tmp_path):
    with engine_of(saved(tiny("DeepseekV3"), tmp_path)) as engine:
        runner = engine._runner
        assert isinstance(runner, VarlenRunner)
        assert runner.cache.gather, "its keys lie elsewhere in every step"
        before = set(runner._storages)
        for heard in [ask(engine, prompt, greedy(12)) for prompt in prompts()]:
            heard.wait()
        assert runner._storages == before


def test_runner_probe_has_no_side_effects(tmp_path):
    folder = saved(tiny("Olmoe"), tmp_path)
    with load_model(folder, LoadSettings()) as served:
        before = served.report()
        attention = served.model.config._attn_implementation
        choose_runner(served, 64)
        after = served.report()
        for name in ("resident", "bytes_read", "hits", "fetches", "swaps"):
            assert after[name] == before[name], name
        assert served.model.config._attn_implementation == attention


@pytest.mark.parametrize("places", [2, 5, 20])
def test_short_context(places, tmp_path):
    folder = saved(tiny("Olmoe"), tmp_path)
    with load_model(folder, LoadSettings(context=places)) as served:
        served.set_memory(served.budget.all_resident_bytes)  # with a budget, no step may hold more
        assert choose_runner(served, places).name == "packed"


def test_budget_includes_all_requests_of_step(tmp_path):
    folder = saved(tiny("Olmoe"), tmp_path)
    with engine_of(folder, context=60, max_concurrency=4) as engine:
        heard = [ask(engine, prompts([4])[0], greedy(11)) for _ in range(8)]  # 4 fill the context
        assert {one.end.reason for one in heard} == {"length"}


def test_encoder_prompt_has_no_logprobs(tmp_path):
    with engine_of(saved(switch(), tmp_path)) as engine:
        with pytest.raises(ConfigError, match="encoder-decoder model"):
            ask(engine, [5, 6], greedy(2, prompt_logprobs=0))
        heard = ask(engine, [5, 6], greedy(2, logprobs=1)).wait()
        assert heard.end.completion_tokens == 2


def test_non_autoregressive_model_raises(tmp_path):
    folder = saved(tiny_family("diffusion_gemma"), tmp_path)
    with (
        pytest.raises(UnsupportedModelError, match="not generate text token by token"),
        engine_of(folder),
    ):
        pass


def test_stop_texts_need_a_tokenizer(tmp_path):
    with engine_of(saved(MODELS["threshold"](), tmp_path)) as engine:
        with pytest.raises(ConfigError, match="stop texts need a tokenizer"):
            ask(engine, [5], greedy(2, stop=("x",)))
        assert ask(engine, [5], greedy(2)).text == ""


@pytest.fixture(scope="module")
def engine():
    """The shipped model in float32; its own bfloat16 has ties for the best token."""
    loaded = load_by_name("reference", context=512, dtype=torch.float32)
    with loaded as served, running(served) as engine:
        yield engine


def ids(engine, text="Once upon a time there was"):
    return engine.served.tokenizer(text)["input_ids"]


def test_text_matches_tokens(engine):
    heard = ask(engine, ids(engine), greedy(16)).wait()
    assert engine.stats().runner == "packed"
    assert heard.tokens == generated(engine.served, ids(engine), 16)
    whole = engine.served.tokenizer.decode([*ids(engine), *heard.tokens])
    assert whole == "Once upon a time there was" + heard.text


def test_stop_text(engine):
    text = ask(engine, ids(engine), greedy(16)).wait().text
    stop = text[10:14]
    heard = ask(engine, ids(engine), greedy(16, stop=(stop,))).wait()
    assert heard.end.reason == "stop"
    assert heard.text == text[: text.index(stop)]
    assert stop not in heard.text


def test_seed_in_batch(engine):
    """In float32: in bfloat16 and without kernels, batching may change rounding and a token."""
    sampling = SamplingParams(max_tokens=12, seed=4, top_p=0.9)
    alone = ask(engine, ids(engine), sampling).wait().tokens
    with paused(engine) as go:
        crowd = [
            ask(engine, ids(engine, "He said"), SamplingParams(max_tokens=9)) for _ in range(3)
        ]
        among = ask(engine, ids(engine), sampling)
        go.set()
        assert among.wait().tokens == alone
    for one in crowd:
        one.wait()


@pytest.mark.parametrize(
    ("dtype", "most", "mean"), [(torch.float32, 1e-4, 1e-5), (torch.bfloat16, 0.5, 0.1)]
)
def test_logprobs_in_batch_differ_by_rounding(dtype, most, mean):
    """Without kernels; bounds are in nats; neighbouring prompt positions differ by 2."""
    with load_by_name("reference", context=512, dtype=dtype) as served, running(served) as engine:
        prompt = ids(engine, STORY)
        alone = logprobs(ask(engine, prompt, greedy(1, prompt_logprobs=0)))
        for others in (1, 2, 5):
            with paused(engine) as go:
                crowd = [ask(engine, prompt[n : 9 * n], greedy(9)) for n in range(1, others + 1)]
                among = ask(engine, prompt, greedy(1, prompt_logprobs=0))
                go.set()
                off = (logprobs(among) - alone).abs()
            assert off.max() < most and off.mean() < mean
            assert {one.end.reason for one in crowd} <= {"length", "stop"}
    assert (alone - alone.roll(1)).abs().mean() > 1


STORY = "Once upon a time there was a little girl who lived near the forest. She had a big dog."


def logprobs(heard):
    return torch.tensor([one.logprob for one in heard.wait().prompt.logprobs[1:]])


NOT_SERVED = {"diffusion_gemma", "openai_privacy_filter"}  # they don't go on token by token
OTHER_INPUT = {"qwen3_omni_moe"}  # its text model alone does not generate


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(families().keys() - NOT_SERVED - OTHER_INPUT))
def test_every_family(name, tmp_path):
    folder = saved(tiny_family(name), tmp_path)
    with load_model(folder, LoadSettings(context=256)) as served:
        served.model.generation_config.eos_token_id = None
        texts = [token_ids(length, seed=length).tolist() for length in (5, 23, 1, 14)]
        expected = [generated(served, text) for text in texts]
        with running(served, prefill_chunk=9, max_concurrency=3) as engine:
            heard = [ask(engine, text, greedy(8)) for text in texts]
            assert [one.wait().tokens for one in heard] == expected
