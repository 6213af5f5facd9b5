"""Pure functions of the page's modules, run in the browser."""

import pytest
from browser import Browser
from page_server import MIB, Pretender

from moefit.serve.memory.budget import format_bytes, parse_bytes


@pytest.fixture(scope="module")
def modules(tab: Browser, address):
    """The page's modules, without rendering the page."""
    handle, url = address
    handle["model"] = Pretender()
    tab.driver.get(url)
    return tab


SIZES = [0, 1, 1023, 1024, 1536, 10 * MIB - 1, 99.94 * MIB, 1000 * MIB, 5046586573, 3 << 40]


def test_bytes_are_written_as_the_command_line_writes_them(modules):
    written = modules.module("numbers", "v[0].map(m.formatBytes)", SIZES)
    assert written == [format_bytes(size) for size in SIZES]


def test_bytes_are_read_as_the_server_reads_them(modules):
    texts = ["4.7GiB", "512MB", "3g", " 1.5 KiB ", "1048576", "12b", ".5mib", "2TiB"]
    assert modules.module("dial", "v[0].map(m.parseBytes)", texts) == [
        parse_bytes(t) for t in texts
    ]
    no = ["", "x", "-1", "0", "1e3", "4.7 GiB 3", "1,5GiB"]
    assert modules.module("dial", "v[0].map(m.parseBytes)", no) == [None] * len(no)


def test_sizes_that_differ_by_a_step_are_written_differently(modules):
    sizes = [375 * MIB + step * MIB // 16 for step in range(40)]
    texts = modules.module(
        "numbers", "v[0].map((size) => m.formatFine(size, v[1]))", sizes, MIB / 16
    )
    assert len(set(texts)) == len(sizes)
    assert modules.module("numbers", "m.formatFine(27 * 2 ** 30, 2 ** 28)") == "27.0 GiB"


def test_the_ends_of_the_dial_are_exact_and_each_position_finds_itself(modules):
    ends = {"floor": 393347073, "top": 405143553}
    there = modules.module("dial", "[...Array(1001).keys()].map((p) => m.bytesAt(p, v[0]))", ends)
    assert (there[0], there[-1]) == (ends["floor"], ends["top"])
    assert sorted(there) == there
    back = modules.module("dial", "v[0].map((size) => m.positionOf(size, v[1]))", there, ends)
    assert back == list(range(1001))
    ticks = modules.module("dial", "m.ticks(v[0])", ends)
    assert 2 <= len(ticks) <= 6 and all(ends["floor"] < size < ends["top"] for size in ticks)
    assert modules.module("dial", "m.ticks({ floor: 5, top: 5 })") == []


def test_the_dial_ends_where_more_memory_is_of_no_use(modules):
    plain, auto = Pretender().memory(), Pretender(auto=True).memory()
    ends = modules.module("dial", "v[0].map(m.rangeOf)", [plain, auto])
    assert ends[0] == {
        "floor": plain["floor"], "full": plain["everything"], "top": plain["everything"]
    }  # fmt: skip
    assert ends[1] == {"floor": auto["floor"], "full": auto["everything"], "top": auto["most"]}
    assert auto["most"] == auto["everything_in"]["native"] > auto["everything"]
    assert (
        modules.module("dial", "m.rangeOf(v[0])", plain | {"budget": {"total": 1 << 62}}) == ends[0]
    )
    rows = {"rows": [None] * 8, "experts": 128}
    code = "[v[0].floor, v[0].full, v[0].top].map((size) => m.expertsAt(size, v[0], v[1]))"
    assert modules.module("dial", code, ends[1], rows) == [8, 128, 128]


def test_formats_that_hold_every_expert_are_on_the_dial(modules):
    memory = Pretender(auto=True).memory()
    held = memory["everything_in"]
    sizes = [held["int2"] - 1, held["int2"], held["int8"] - 1, held["int8"], 2 * held["native"]]
    found = modules.module("dial", "v[0].map((size) => m.finest(size, v[1]))", sizes, held)
    assert found == [None, "int2", "int6", "int8", "native"]
    assert modules.module("dial", "m.finest(5, {})") is None
    ticks = modules.module("dial", "m.formatTicks(v[0].everything_in, m.rangeOf(v[0]))", memory)
    assert {one["name"]: one["bytes"] for one in ticks} == {
        "int4": held["int4"], "int8": held["int8"], "": held["int6"]
    }  # fmt: skip
    assert modules.module("dial", "m.formatTicks({}, m.rangeOf(v[0]))", memory) == []


def test_only_what_differs_is_asked_for(modules):
    force = {"bytes": 100, "mode": "exact", "bound": 0.3}
    cases = [
        ({}, None),
        ({"bytes": 100, "mode": "exact"}, None),
        ({"bytes": "4GiB"}, {"bytes": "4GiB"}),
        ({"bytes": 90, "mode": "virtual"}, {"bytes": 90, "mode": "virtual"}),
        ({"bound": 0.2}, None),
        ({"mode": "bounded", "bound": 0.3}, {"mode": "bounded"}),
        ({"mode": "bounded", "bound": 0.2}, {"mode": "bounded", "bound": 0.2}),
    ]
    asked = modules.module(
        "dial", "v[0].map((one) => m.change(one, v[1]))", [c[0] for c in cases], force
    )
    assert asked == [body for _, body in cases]


@pytest.mark.parametrize("total", [None, 383 * MIB, 500 * MIB])
def test_the_breakdowns_parts_fill_the_budget_and_follow_each_other(modules, total):
    model = Pretender()
    model.total = total
    memory = model.memory()
    view = modules.module("breakdown", "m.breakdown(v[0])", memory)
    assert sum(part["bytes"] for part in view["parts"]) == view["total"]
    edges = [0.0] + [part["to"] for part in view["parts"]]
    assert [part["from"] for part in view["parts"]] == edges[:-1]
    assert edges[-1] * view["axis"] == pytest.approx(view["total"])
    assert all(0 <= share <= 1 for share in view["marks"].values())
    assert view["marks"]["most"] * view["axis"] == pytest.approx(memory["most"])


def test_a_plan_is_shown_with_its_predicted_cost(modules):
    plan = {"words": "12 int4, exact", "loss": 0.0123, "margin": 0.004, "tokens_per_second": 11.26}
    said = modules.module("breakdown", "v.map(m.planned)", plan, {**plan, "loss": -0.002}, None)
    assert said == [
        "Plan: 12 int4, exact. Predicted: perplexity +1.2% (±0.4%), 11.3 tokens/s.",
        "Plan: 12 int4, exact. Predicted: perplexity -0.2% (±0.4%), 11.3 tokens/s.",
        "",
    ]


def test_layers_are_told_apart_by_the_shortest_names(modules):

    def short(*names):
        return modules.module("residency", "m.shortNames(v[0])", names)

    assert short("model.layers.3.mlp", "model.layers.11.mlp") == ["3", "11"]
    assert short("encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp") == ["enc 1", "dec 1"]
    assert short("model.encoder.layers.3.ffn", "model.decoder.layers.3.ffn") == ["enc 3", "dec 3"]
    assert short("a.1.b", "a.1.c") == ["0", "1"]


def test_events_are_whole_wherever_the_stream_is_cut(modules):
    stream = 'data: {"text": "é\\n"}\r\n\r\n: comment\n\ndata:a\ndata: b\n\ndata: [DONE]\n\n'
    code = """[...Array(v[0].length).keys()].map((cut) => {
      const reader = new m.EventReader();
      return [...reader.push(v[0].slice(0, cut)), ...reader.push(v[0].slice(cut))];
    })"""
    for events in modules.module("events", code, stream):
        assert events == ['{"text": "é\\n"}', "a\nb", "[DONE]"]


def test_a_history_draws_gaps_where_nothing_was_known(modules):
    code = """(() => { const h = new m.History(5);
      v[0].forEach((value) => h.push(value)); return h.path(40, 11); })()"""
    assert (
        modules.module("history", code, [1, 2, None, 4, 0])
        == "M0.0 7.8L10.0 5.5M30.0 1.0L40.0 10.0"
    )
    assert modules.module("history", code, [None]) == ""


def test_rates_come_of_what_the_counters_gained(modules):
    before = {"hits": 10, "fetches": 0, "bytes_read": 100}
    now = {"hits": 13, "fetches": 1, "bytes_read": 300}
    code = "m.between(v[0], v[1], v[2])"
    assert modules.module("history", code, before, now, 2) == {"hitRate": 0.75, "bytesRead": 100}
    idle = {"hitRate": None, "bytesRead": 0}
    assert modules.module("history", code, now, now, 2) == idle
    assert modules.module("history", code, now, before, 2) == {"hitRate": None, "bytesRead": None}


def test_pauses_between_tries_grow_and_end_growing(modules):
    pauses = modules.module("poller", "[0, 1, 2, 3, 4, 5, 50].map(m.pause)")
    assert pauses == [1000, 1000, 2000, 4000, 8000, 15000, 15000]
