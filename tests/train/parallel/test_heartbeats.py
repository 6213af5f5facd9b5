"""Who is lost: what heartbeats say about it, and what processes that wait in vain say."""

import json
import socket
import time
from contextlib import ExitStack

import pytest
from lost_cases import CASES
from processes import results

from moefit.train.parallel.heartbeats import Beat, Seen, missing


def seen(rank, *, begun=5, silent=0.5, end=""):
    beat = Beat(count=9, begun=begun, work=0, end=end)
    return Seen(beat=beat, silent=silent, idle=0.0, where=f"node-{rank}, process id {rank}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({2: {"silent": 7.0}}, "process 2 (node-2, process id 2): no heartbeat for 7 s"),
        # What noticed the loss has ended, and is silent too.
        ({1: {"silent": 9.0, "end": "lost"}, 2: {"silent": 7.0}}, "process 2"),
        ({0: {"end": "done"}, 3: {"end": "failed"}}, "process 3 (node-3, process id 3): ended"),
        ({1: {"begun": 4}}, "process 1 (node-1, process id 1): still running, but did not come"),
        ({1: {"begun": 4}, 2: {"begun": 4, "end": "lost"}, 3: {"begun": 3}}, "and process 3"),
        ({1: {"begun": 2, "silent": 3.0}, 2: {"silent": 4.0}}, "2 (node-2, process id 2): no"),
    ],
)
def test_who_is_missing(changes, expected):
    found = missing([seen(rank, **changes.get(rank, {})) for rank in range(4)], silence=3.0)
    assert found is None if expected is None else expected in (found or "")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each pair of processes of `lost_cases` says, and after how long at most."""
    folder = tmp_path_factory.mktemp("lost")
    (folder / "results.json").write_text("{}")
    with ExitStack() as ports:
        free = [ports.enter_context(socket.socket()) for _ in CASES]
        for one in free:
            one.bind(("127.0.0.1", 0))
        numbers = [str(one.getsockname()[1]) for one in free]
    began = time.monotonic()
    results(2 * len(CASES), "lost_cases", folder, *numbers, last_dies=True)
    assert time.monotonic() - began < 50  # a process that hangs does so for a minute
    files = (folder / f"{case.__name__}.{rank}.json" for case in CASES for rank in range(2))
    return {one.stem: json.loads(one.read_text()) for one in files if one.is_file()}


@pytest.mark.parametrize(
    ("process", "lost", "why"),
    [
        ("stopped_in_a_step.0", 1, "no heartbeat for"),
        ("stopped_in_a_task.1", 0, "no heartbeat for"),
        ("hanging_in_a_task.1", 0, "it has computed nothing for"),
        ("hanging_in_a_step.0", 1, "still running, but did not come to where the others wait"),
        ("failing.0", 1, "ended with an error of its own"),
    ],
)
def test_the_error_names_the_lost_process(said, process, lost, why):
    text = said[process]
    assert f"process {1 - lost} of 2 lost contact with process {lost} (" in text
    assert f"{socket.gethostname()}, process id" in text
    assert why in text
    assert "the same command resumes from the last checkpoint" in text


def test_a_process_that_computes_is_not_lost(said):
    assert said["computing.0"] == said["computing.1"] == ""
