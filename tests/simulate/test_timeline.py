"""Routing through slots and guesses, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moefit.cli.app import app
from moefit.errors import ConfigError
from moefit.serve.hybrid.costs import Costs
from moefit.serve.hybrid.rules import RULES, compute_all, fetch_all
from moefit.simulate.costs import ExpertShape, find_hardware, find_shape
from moefit.simulate.routing import Workload, random_routing, read_recording, steps_of
from moefit.simulate.timeline import Cache, Simulation

SHAPE = ExpertShape(
    name="tiny", layers=3, experts=8, chosen=2, hidden_size=4, width=8, bits=16, source="made up"
)
COSTS = Costs(load=10, gpu=(1, 0), far=(4, 0), far_read=4, between=5)


def steps(number: int = 40, batch: int = 2) -> list:
    ids_TLK = random_routing(SHAPE, 1.0, number * batch)
    sequences = [ids_TLK[at::batch] for at in range(batch)]
    return list(steps_of(sequences, Workload(batch=batch, steps=number)))


def test_random_routing_has_its_skew() -> None:
    even, skewed = (random_routing(SHAPE, skew, 4000) for skew in (0.0, 2.0))
    assert even.shape == (4000, 3, 2) and (np.diff(np.sort(even, axis=2)) > 0).all()
    for ids, least, most in ((even, 0.22, 0.28), (skewed, 0.8, 1.0)):
        shares = [np.bincount(ids[:, layer].ravel(), minlength=8) / 4000 for layer in range(3)]
        assert all(least < share.max() < most for share in shares)
    assert np.array_equal(random_routing(SHAPE, 1.0, 9), random_routing(SHAPE, 1.0, 9))


def test_without_slots_nothing_is_kept() -> None:
    for name, rule in RULES.items():
        found = Simulation(COSTS, SHAPE, rule, Cache()).run(steps())
        assert found.resident == found.prefetched == found.wasted == 0
        assert (found.tokens, found.layers) == (80, 120)
        assert found.weight_bytes == found.fetched * SHAPE.expert_bytes
        assert found.seconds >= max(found.gpu, found.far) + found.between, name
        assert found.between == 5 * 120
    everything = Simulation(COSTS, SHAPE, fetch_all, Cache()).run(steps())
    assert everything.fetched == everything.wanted and everything.token_bytes == 0
    none = Simulation(COSTS, SHAPE, compute_all, Cache()).run(steps())
    assert none.weight_bytes == 0 and none.token_bytes == 80 * 3 * 2 * SHAPE.token_bytes


def test_slots_for_all_experts_load_each_once() -> None:
    found = Simulation(COSTS, SHAPE, fetch_all, Cache(slots=8)).run(steps(100))
    assert found.fetched == 3 * 8
    assert found.resident == found.wanted - 24
    few = Simulation(COSTS, SHAPE, fetch_all, Cache(slots=2)).run(steps(100))
    assert 24 < few.fetched < few.wanted
    there = Simulation(COSTS, SHAPE, compute_all, Cache(slots=8)).run(steps(100))
    assert there.resident == 0  # what the far side computes does not enter


def test_prefetching_uses_the_idle_link_only() -> None:
    """After the first layer, 5 of idle link and the layer's time less its copies: no load of 10."""
    none = Simulation(COSTS, SHAPE, fetch_all, Cache(recall=1.0)).run(steps())
    assert none.prefetched == 0
    roomy = Costs(load=10, gpu=(1, 0), far=(4, 0), far_read=4, between=100)
    before, after = (
        Simulation(roomy, SHAPE, fetch_all, Cache(recall=recall)).run(steps())
        for recall in (0, 1.0)
    )
    first = sum(len(set(one[:, 0].ravel().tolist())) for one in steps())
    assert after.prefetched == after.wanted - first and after.wasted == 0
    assert after.seconds < before.seconds
    half = Simulation(roomy, SHAPE, fetch_all, Cache(recall=0.5)).run(steps())
    assert 0.3 < half.prefetched / after.prefetched < 0.7
    assert half.prefetched + half.wasted == after.prefetched


def test_steps_take_the_next_sequence_when_one_ends() -> None:
    sequences = [random_routing(SHAPE, 0, length) for length in (3, 1, 2)]
    found = [len(one) for one in steps_of(sequences, Workload(batch=2, steps=99))]
    assert found == [2, 2, 2]
    assert [len(one) for one in steps_of(sequences, Workload(prompt=2, steps=9))] == [2, 2]
    with pytest.raises(ConfigError, match="--prompt 3 or less"):
        list(steps_of(sequences, Workload(prompt=4)))


def test_recordings_are_read_and_wrong_ones_refused(tmp_path: Path) -> None:
    ids = random_routing(SHAPE, 0, 5).astype(np.uint8)
    np.savez(tmp_path / "good.npz", experts=ids, seq_ptr=np.array([0, 2, 5]))
    assert [len(one) for one in read_recording(tmp_path / "good.npz", SHAPE)] == [2, 3]
    np.savez(tmp_path / "one.npz", experts=ids)
    assert len(read_recording(tmp_path / "one.npz", SHAPE)) == 1
    for name, arrays in {
        "flat": {"experts": ids[0]},
        "other": {"numbers": ids},
        "no layer": {"experts": ids[:, :0]},
        "floats": {"experts": ids.astype(float)},
        "objects": {"experts": ids.astype(object)},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    np.save(tmp_path / "array.npy", ids)
    (tmp_path / "text.npz").write_text("no array")
    (tmp_path / "empty.npz").touch()
    wrong = sorted({*tmp_path.iterdir()} - {tmp_path / "good.npz", tmp_path / "one.npz"})
    assert len(wrong) == 8
    for path in (*wrong, tmp_path / "none.npz"):
        with pytest.raises(ConfigError, match="is not a recorded routing"):
            read_recording(path, SHAPE)
    for ends in ([], [5], [0, 4], [0, 9], [1, 5], [0, 3, 2, 5], [[0, 5]], [0.0, 5.0]):
        np.savez(tmp_path / "ends.npz", experts=ids, seq_ptr=np.array(ends))
        with pytest.raises(ConfigError, match="does not divide its 5 tokens"):
            read_recording(tmp_path / "ends.npz", SHAPE)
    twice = ids.copy()
    twice[3, 1, 0] = twice[3, 1, -1]
    np.savez(tmp_path / "twice.npz", experts=twice)
    with pytest.raises(ConfigError, match="for token 3 in layer 1: one of them twice"):
        read_recording(tmp_path / "twice.npz", SHAPE)
    np.savez(tmp_path / "padded.npz", experts=ids.astype(int) - 1)
    for path, shape in (("good.npz", find_shape("mixtral-8x7b")), ("padded.npz", SHAPE)):
        with pytest.raises(ConfigError, match="give the --shape of the recorded model"):
            read_recording(tmp_path / path, shape)


def run(*arguments: str):
    return CliRunner().invoke(app, ["simulate", *arguments])


def test_command(tmp_path: Path) -> None:
    picture = tmp_path / "times.png"
    done = run("--steps", "3", "--slots", "8", "--picture", str(picture), "--json")
    assert done.exit_code == 0, done.output
    rules = json.loads(done.stdout)["rules"]
    assert rules.keys() == RULES.keys()
    assert rules["fetch-all"]["times_fetch_all"] == 1
    assert picture.stat().st_size > 5000
    table = run("--steps", "3", "--prompt", "16")
    assert table.exit_code == 0 and "balanced" in table.stdout and "rates: " in table.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hardware", "monda"), "did you mean 'monde'"),
        (("--shape", "mixtral"), "did you mean 'mixtral-8x7b'"),
        (("--slots", "99"), "has 32 experts"),
        (("--eviction", "random"), "give one of lru"),
        (("--picture", "times.txt"), "ends in .png or .svg"),
        (("none.npz",), "is not a recorded routing"),
        (("--skew", "inf"), "no finite number"),
        (("--seed", "-1"), "greater than or equal to 0"),
    ],
)
def test_errors_name_what_works(arguments, message) -> None:
    done = run(*arguments)
    assert done.exit_code != 0
    assert message in str(done.exception) + done.output


def test_own_hardware(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    fields = find_hardware("monde").model_dump(exclude={"name"})
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items()))
    assert find_hardware(str(path)).name == "mine"
    many = find_shape("mixtral-8x7b").model_dump(exclude={"name"}) | {"chosen": 9}
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in many.items()))
    with pytest.raises(ConfigError, match="9 chosen of 8 experts"):
        find_shape(str(path))
    path.write_text("link: 0\n")
    with pytest.raises(ConfigError, match="its fields are link, gpu_bandwidth"):
        find_hardware(str(path))
