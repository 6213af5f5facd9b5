"""Sampling, penalties and log-probabilities."""

from collections import Counter
from math import log

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from moefit.engine.api import SamplingParams
from moefit.engine.sampler import Sampler, check_sampling, logprobs_of, sample
from moefit.errors import ConfigError
from moefit.serve.hf.generation_config import Suppressed

VOCABULARY = 12


def rows(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(logits_V: torch.Tensor, number: int, **sampling) -> Counter[int]:
    sampler = Sampler(SamplingParams(max_tokens=1, **({"seed": 3} | sampling)))
    return Counter(sampler.choose(logits_V)[0] for _ in range(number))


def test_temperature_zero_is_greedy() -> None:
    logits_NV = rows(37)
    samplers = [Sampler(SamplingParams(max_tokens=1, temperature=0.0)) for _ in logits_NV]
    chosen = sample(logits_NV, samplers)
    assert chosen == [(token, None) for token in logits_NV.argmax(-1).tolist()]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_nan_logits_affect_only_their_row(wrong) -> None:
    logits_NV = rows(20)
    expected = [int(row_V.argmax()) for row_V in logits_NV]
    logits_NV[17] = wrong
    for temperature in (0.0, 1e-6):
        samplers = [
            Sampler(SamplingParams(max_tokens=1, temperature=temperature)) for _ in logits_NV
        ]
        chosen = sample(logits_NV, samplers)
        assert isinstance(chosen[17], FloatingPointError)
        del chosen[17]
        assert [isinstance(one, tuple) and one[0] for one in chosen] == expected[:17] + expected[
            18:
        ]
    with pytest.raises(FloatingPointError, match="not finite"):
        logprobs_of(logits_NV, [1] * 20, 0)


def test_excluded_token_has_zero_probability() -> None:
    logits_NV = rows(1)
    logits_NV[0, 3] = -torch.inf
    (told,) = logprobs_of(logits_NV, [3], VOCABULARY)
    assert told.logprob == -torch.inf == told.top[-1][1]
    (chosen,) = sample(logits_NV, [Sampler(SamplingParams(max_tokens=1, logprobs=VOCABULARY))])
    assert isinstance(chosen, tuple) and chosen[0] != 3


def test_lowest_bfloat16_is_excluded() -> None:
    logits_NV = rows(3).bfloat16()
    chosen = sample(logits_NV, [Sampler(SamplingParams(max_tokens=1, temperature=0.0))] * 3)
    assert chosen == [(token, None) for token in logits_NV.float().argmax(-1).tolist()]


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-100, 1e-3])
@pytest.mark.parametrize("more", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_low_temperature_is_greedy(temperature: float, more: dict) -> None:
    for seed in range(5):
        (logits_V,) = rows(1, seed)
        logits_V[seed] = -torch.inf
        counts = drawn(logits_V, 20, temperature=temperature, **more)
        assert counts == {int(logits_V.argmax()): 20}


def test_samples_follow_probabilities() -> None:
    (logits_V,) = rows(1)
    counts = drawn(logits_V, 4000, temperature=1.3)
    shares = (logits_V / 1.3).softmax(-1).tolist()
    for token, share in enumerate(shares):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, VOCABULARY + 2),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_top_k_and_top_p_match_transformers(seed, temperature, top_k, top_p) -> None:
    logits_1V = rows(1, seed)
    kept_1V = TemperatureLogitsWarper(temperature)(None, logits_1V)
    if top_k:
        kept_1V = TopKLogitsWarper(top_k)(None, kept_1V)
    if top_p < 1:
        kept_1V = TopPLogitsWarper(top_p)(None, kept_1V)
    shares = kept_1V[0].softmax(-1)
    allowed = {token for token, share in enumerate(shares.tolist()) if share > 0}
    likely = {token for token, share in enumerate(shares.tolist()) if share > 0.05}
    found = drawn(logits_1V[0], 300, temperature=temperature, top_k=top_k, top_p=top_p)
    assert likely <= found.keys() <= allowed


def test_seed_is_independent_of_batch() -> None:
    logits_NV = rows(4)
    sampling = SamplingParams(max_tokens=9, seed=5)
    alone = [sample(logits_NV[:1], [one])[0] for one in [Sampler(sampling)] for _ in range(9)]
    one, others = Sampler(sampling), [Sampler(SamplingParams(max_tokens=9)) for _ in range(3)]
    crowd = [sample(logits_NV[[3, 0, 1, 2]], [others[0], one, *others[1:]])[1] for _ in range(9)]
    assert alone == crowd
    assert len(set(alone)) > 1


def test_unseeded_samples_differ() -> None:
    flat_V = torch.zeros(VOCABULARY)
    answers = {tuple(drawn(flat_V, 12, seed=None).elements()) for _ in range(3)}
    assert len(answers) > 1


def test_penalties_count_output_tokens() -> None:
    logits_V = torch.tensor([3.0, 2.0, 1.2, 0.0])
    sampling = SamplingParams(
        max_tokens=9, temperature=0.0, presence_penalty=0.5, frequency_penalty=0.4
    )
    sampler = Sampler(sampling)
    left, expected = logits_V.clone(), []
    for _ in range(9):
        expected.append(int(left.argmax()))
        counts = torch.tensor([expected.count(token) for token in range(4)])
        left = logits_V - 0.4 * counts - 0.5 * (counts > 0)
    assert [sampler.choose(logits_V)[0] for _ in range(9)] == expected
    assert len(set(expected)) > 2


def test_logprobs_ignore_sampling_parameters() -> None:
    (logits_V,) = rows(1)
    sampling = SamplingParams(
        max_tokens=2, temperature=0.2, top_k=2, seed=1, logprobs=3, presence_penalty=1.0
    )
    sampler, expected_V = Sampler(sampling), logits_V.log_softmax(-1)
    for _ in range(2):
        token, told = sampler.choose(logits_V)
        assert told is not None
        assert (told.token, told.logprob) == (token, pytest.approx(float(expected_V[token])))
        assert [one for one, _ in told.top] == expected_V.topk(3).indices.tolist()
        assert [value for _, value in told.top] == pytest.approx(expected_V.topk(3).values.tolist())


def test_logprobs_of_many_rows() -> None:
    logits_NV, tokens = rows(37), [n % VOCABULARY for n in range(37)]
    told = logprobs_of(logits_NV, tokens, 0)
    expected = logits_NV.log_softmax(-1)[range(37), tokens].tolist()
    assert [one.logprob for one in told] == pytest.approx(expected)
    assert all(one.top == () for one in told)
    assert logprobs_of(logits_NV[:0], [], 2) == []


def test_more_top_logprobs_than_tokens() -> None:
    (told,) = logprobs_of(torch.zeros(1, 3), [1], 20)
    assert told.logprob == pytest.approx(-log(3))
    assert len(told.top) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"temperature": -0.1}, "greedy"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": -0.1}, "top_p=-0.1"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"min_p": float("nan")}, "min_p=nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({"logit_bias": ((3, 100.5),)}, "logit_bias=100.5 for token 3"),
        ({"logit_bias": ((3, float("nan")),)}, "logit_bias=nan"),
        ({"presence_penalty": float("inf")}, "presence_penalty=inf"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"prompt_logprobs": -2}, "prompt_logprobs=-2"),
        ({"seed": 2**64}, "64 bits"),
    ],
)
def test_invalid_values_raise(change, message) -> None:
    check_sampling(SamplingParams(max_tokens=1))
    with pytest.raises(ConfigError, match=message):
        check_sampling(SamplingParams(**({"max_tokens": 1} | change)))


def twin(
    logits_V: torch.Tensor, before: list[int], answer: list[int], how: SamplingParams
) -> list[float]:
    """Reference: scores before temperature, computed by a plain loop."""
    scores, biases = [float(value) for value in logits_V], dict(how.logit_bias)
    for token in range(len(scores)):
        scores[token] += biases.get(token, 0.0)
        if token in (*before, *answer):
            high = scores[token] > 0
            factor = how.repetition_penalty
            scores[token] = scores[token] / factor if high else scores[token] * factor
        scores[token] -= how.frequency_penalty * answer.count(token)
        scores[token] -= how.presence_penalty * (token in answer)
    return scores


changes = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7, 5.0]),
        "presence_penalty": st.sampled_from([0.0, 0.5, -1.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "logit_bias": st.dictionaries(
            st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, -1.5, 0.5, 3.0]), max_size=4
        ).map(lambda biases: tuple(biases.items())),
    }
)


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 99),
    before=st.lists(st.integers(0, VOCABULARY + 3), max_size=5),  # some have no logit
    crowd=st.lists(changes, min_size=1, max_size=4),
)
def test_penalties_and_biases_by_request(seed, before, crowd) -> None:
    """Against the reference, step by step, batched and alone."""
    all_how = [SamplingParams(max_tokens=6, temperature=0.0, **one) for one in crowd]
    samplers = [Sampler(how, context=before) for how in all_how]
    alone = [Sampler(how, context=before) for how in all_how]
    answers: list[list[int]] = [[] for _ in crowd]
    for step in range(6):
        logits_NV = rows(len(crowd), seed * 10 + step)
        kept_NV = logits_NV.clone()
        chosen = sample(logits_NV, samplers)
        assert torch.equal(logits_NV, kept_NV), "the model's own logits stay"
        for row_V, how, one, answer, got in zip(
            logits_NV, all_how, alone, answers, chosen, strict=True
        ):
            scores = twin(row_V, before, answer, how)
            assert got is not None
            assert scores[got[0]] == pytest.approx(max(scores), abs=1e-4)
            assert sample(row_V[None], [one]) == [got]
            answer.append(got[0])


@settings(deadline=None, max_examples=80)
@given(
    seed=st.integers(0, 99),
    context=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
    penalty=st.sampled_from([1.0, 1.2, 0.5]),
    biases=st.dictionaries(
        st.integers(0, VOCABULARY - 1), st.sampled_from([-9.0, 2.0]), max_size=3
    ),
    always=st.sets(st.integers(0, VOCABULARY + 1), max_size=3),
    first=st.sets(st.integers(0, VOCABULARY - 1), max_size=3),
    sequences=st.sets(st.lists(st.integers(0, 3), min_size=2, max_size=3).map(tuple), max_size=6),
    top_k=st.sampled_from([0, 1, 4]),
    top_p=st.sampled_from([0.5, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_candidates_match_transformers(
    seed, context, penalty, biases, always, first, sequences, top_k, top_p, min_p
) -> None:
    """Any combination equals transformers' processors in transformers' order."""
    processors = transformers.LogitsProcessorList()
    if biases:
        pairs = {(token,): bias for token, bias in biases.items()}
        processors.append(transformers.SequenceBiasLogitsProcessor(pairs))
    if penalty != 1:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
    if sequences:
        listed = [list(sequence) for sequence in sequences]
        processors.append(transformers.NoBadWordsLogitsProcessor(listed))
    processors.append(transformers.SuppressTokensLogitsProcessor(sorted(always)))
    processors.append(
        transformers.SuppressTokensAtBeginLogitsProcessor(sorted(first), len(context))
    )
    processors.append(TemperatureLogitsWarper(0.8))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    processors.append(transformers.MinPLogitsWarper(min_p))
    how = SamplingParams(
        max_tokens=2, temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed,
        repetition_penalty=penalty, logit_bias=tuple(biases.items()),
    )  # fmt: skip
    rules = Suppressed(always=frozenset(always), first=frozenset(first), sequences=tuple(sequences))
    for _ in range(20):
        sampler, text = Sampler(how, context=context, suppressed=rules), list(context)
        for step in range(2):
            logits_1V = rows(1, seed * 10 + step)
            shares = processors(torch.tensor([text]), logits_1V)[0].softmax(-1)
            (chosen,) = sample(logits_1V, [sampler])
            assert chosen is not None and shares[chosen[0]] > 0
            if shares.max() > 0.999:
                assert chosen[0] == int(shares.argmax())
            text.append(chosen[0])


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 99), top_p=st.sampled_from([0.6, 1.0]), min_p=st.floats(0, 1))
def test_min_p_matches_transformers(seed, top_p, min_p) -> None:
    logits_1V = rows(1, seed)
    kept_1V = TopPLogitsWarper(top_p)(None, logits_1V) if top_p < 1 else logits_1V
    shares = transformers.MinPLogitsWarper(min_p)(None, kept_1V)[0].softmax(-1)
    allowed = {token for token, share in enumerate(shares.tolist()) if share > 0}
    likely = {token for token, share in enumerate(shares.tolist()) if share > 0.05}
    found = drawn(logits_1V[0], 300, top_p=top_p, min_p=min_p)
    assert likely <= found.keys() <= allowed
    for token, share in enumerate(shares.tolist()):
        assert found[token] / 300 == pytest.approx(share, abs=0.12)


@pytest.mark.parametrize("greedy", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": 1}])
def test_greedy_settings_are_equivalent(greedy) -> None:
    (logits_V,) = rows(1)
    assert drawn(logits_V, 20, **greedy) == {int(logits_V.argmax()): 20}
    assert Sampler(SamplingParams(max_tokens=1, **greedy)).plain


def test_request_without_candidates_fails_alone() -> None:
    everything = Suppressed(always=frozenset(range(VOCABULARY)))
    samplers = [
        Sampler(SamplingParams(max_tokens=1, temperature=temperature), suppressed=everything)
        for temperature in (0.0, 1.0)
    ]
    chosen = sample(rows(3), [*samplers, Sampler(SamplingParams(max_tokens=1))])
    assert [type(one) for one in chosen] == [FloatingPointError, FloatingPointError, tuple]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.8},
        {"temperature": 1.2, "top_p": 0.7, "presence_penalty": 1.0},
        {"temperature": 0.5, "top_k": 5, "min_p": 0.1, "logprobs": 2},
        {"temperature": 0.0, "repetition_penalty": 1.5},
    ],
)
def test_foreseen_choices_are_those_that_follow(sampling) -> None:
    """And foreseeing changes nothing, however often and however far it is done."""
    rows_NV = 3 * torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(max_tokens=12, seed=7, **sampling)
    sampler, alone = (Sampler(params, context=[1, 2]) for _ in range(2))
    wanted = [alone.choose(row_V)[0] for row_V in rows_NV]
    for place in range(12):
        foreseen = sampler.foreseen()
        assert foreseen is not None
        assert [foreseen(row_V) for row_V in rows_NV[place:]] == wanted[place:]
        assert sampler.choose(rows_NV[place])[0] == wanted[place]


def test_rows_of_fewer_tokens_are_foreseen_too() -> None:
    """A draft model's, without the last ids: biases and penalties of these are left out."""
    params = SamplingParams(
        max_tokens=2, temperature=0.0, logit_bias=((25, 50.0), (7, 9.0)), presence_penalty=1.0
    )
    sampler = Sampler(params)
    assert sampler.choose(torch.zeros(30))[0] == 25
    foreseen = sampler.foreseen()
    assert foreseen is not None
    assert [foreseen(torch.zeros(20)), foreseen(torch.zeros(30))] == [7, 25]


def test_nothing_is_foreseen_where_the_likeliest_token_is_chosen() -> None:
    assert Sampler(SamplingParams(max_tokens=1, temperature=0.0, logprobs=1)).foreseen() is None
