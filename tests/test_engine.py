"""Requests that share a model get what they would get alone."""

import time

import pytest
from engines import Heard, engine_of, generated, greedy, prompts
from tiny_served import FAMILIES, saved, tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: saved(tiny(family), tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_crowd_gets_what_each_would_get_alone(folders, family):
    with engine_of(folders[family], prefill_chunk=6, max_concurrency=4) as engine:
        assert engine.stats().runner == "packed"
        heard = []
        for prompt in prompts():
            heard.append(Heard())
            engine.submit(prompt, greedy(), heard[-1])
            time.sleep(0.005)  # some arrive while others decode
        ends = [one.end for one in heard]
        assert [end.reason for end in ends] == ["length"] * len(ends), ends
        engine.close()
        for prompt, one in zip(prompts(), heard, strict=True):
            assert one.tokens == generated(engine.served, prompt)
