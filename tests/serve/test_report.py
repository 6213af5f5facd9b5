import json
from collections.abc import Iterator

import pytest
from tiny_served import saved, settled, tiny, tokens, with_slots

from moefit.quant.format import FORMATS
from moefit.serve.config import LoadSettings
from moefit.serve.load import load_model
from moefit.serve.model import ServedModel


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    folder = saved(tiny("Mixtral"), tmp_path_factory.mktemp("model"))
    with load_model(folder, LoadSettings(context=64, precision="int4")) as served:
        served.set_memory(with_slots(served, 3))
        yield served


def test_report_has_plain_values(served: ServedModel) -> None:
    report = served.report()
    assert json.loads(json.dumps(report)) == report


def test_report_counts_block_contents(served: ServedModel) -> None:
    served.model(tokens(1, 5))
    settled(served)
    report = served.report()
    assert report["slots"] == dict.fromkeys(served.blocks, 3)
    assert report["experts"] == dict.fromkeys(served.blocks, 8)
    assert report["formats"] == {name: {"int4": 3} for name in served.blocks}
    specs = next(iter(served.blocks.values())).block.layout.specs
    slot = FORMATS["int4"].nbytes(specs)
    assert report["slot_bytes"] == 3 * slot * len(served.blocks)
    assert report["spare_bytes"] % slot == 0 and report["spare_bytes"] > 0
    for name, resident in report["resident"].items():
        assert resident == sorted(served.blocks[name].slot_table.residents) and len(resident) <= 3
    assert report["experts_from"] == "encoded while reading"
    assert report["loads"] > 0 and report["bytes_read"] > 0 and report["load_seconds"] > 0
    assert 0 < report["process_bytes"] <= report["peak_process_bytes"]


def test_report_shows_current_settings(served: ServedModel) -> None:
    before = served.report()
    served.set_mode("bounded")
    budget = served.set_memory(with_slots(served, 2))
    after = served.report()
    served.set_mode("exact")
    served.set_memory(with_slots(served, 3))
    assert (before["mode"], after["mode"], after["prefill"]) == ("exact", "bounded", "exact")
    assert after["budget"] == budget.as_dict() != before["budget"]
    assert "host_bytes" not in after, "there is no tier on a CPU"
