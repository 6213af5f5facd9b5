"""A single request, answered in the calling thread's time."""

from threading import Thread, current_thread

import pytest
import torch
from engines import greedy, text
from tiny_served import saved, tiny

from moefit.engine.one_request import answer
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from tests.engine.test_invariance import WIDER


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = saved(tiny("Olmoe", **WIDER["Olmoe"]), tmp_path_factory.mktemp("olmoe"))
    with load_model(folder, LoadSettings(context=128, dtype=torch.float32)) as served:
        served.model.generation_config.eos_token_id = None
        yield served


def test_text_is_shown_in_the_calling_thread(served) -> None:
    threads = []
    tokens = answer(served, text(5), greedy(6), show=lambda _: threads.append(current_thread()))
    assert len(tokens) == 6 and set(threads) == {current_thread()}


def test_says_why_nothing_is_drafted(served) -> None:
    remarks = []
    answer(served, text(5), greedy(2), speculate="ngram", remark=remarks.append)
    assert not remarks
    served.set_mode("virtual")
    try:
        answer(served, text(5), greedy(2), remark=remarks.append)
        assert not remarks
        answer(served, text(5), greedy(2), speculate="ngram", remark=remarks.append)
    finally:
        served.set_mode("exact", prefill="exact")
    assert len(remarks) == 1 and "in mode virtual" in remarks[0]


@pytest.mark.parametrize("error", [BrokenPipeError, KeyboardInterrupt])
def test_error_of_the_reader_ends_the_request(served, error) -> None:
    """Such as that of a closed pipe; another request can be answered afterwards."""
    raised = []

    def show(_: str) -> None:
        raise error

    def run() -> None:
        try:
            answer(served, text(5), greedy(60), show=show)
        except BaseException as caught:  # noqa: BLE001 - compared below
            raised.append(type(caught))

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert raised == [error]
    assert len(answer(served, text(5), greedy(3))) == 3
