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


def test_bytes_are_formatted_like_command_line(modules):
    written = modules.module("numbers", "v[0].map(m.formatBytes)", SIZES)
    assert written == [format_bytes(size) for size in SIZES]


def test_bytes_are_parsed_like_server(modules):
    texts = ["4.7GiB", "512MB", "3g", " 1.5 KiB ", "1048576", "12b", ".5mib", "2TiB"]
    assert modules.module("dial", "v[0].map(m.parseBytes)", texts) == [
        parse_bytes(t) for t in texts
    ]
    no = ["", "x", "-1", "0", "1e3", "4.7 GiB 3", "1,5GiB"]
    assert modules.module("dial", "v[0].map(m.parseBytes)", no) == [None] * len(no)


def test_adjacent_slider_sizes_differ(modules):
    sizes = [375 * MIB + step * MIB // 16 for step in range(40)]
    texts = modules.module(
        "numbers", "v[0].map((size) => m.formatFine(size, v[1]))", sizes, MIB / 16
    )
    assert len(set(texts)) == len(sizes)
    assert modules.module("numbers", "m.formatFine(27 * 2 ** 30, 2 ** 28)") == "27.0 GiB"


def test_formats_are_named_as_the_checkpoint_names_them(modules):
    blocks = Pretender().memory()["blocks"][:2]
    names = [block["name"] for block in blocks]
    code = """(() => {
        const map = m.grid(v[0], v[1]), row = map.rows[0], first = row.cells[row.order[0]];
        const formats = [...map.formats].map(([name, { count }]) => [name, count]);
        return [formats, m.describe(row, first), map.mixed, map.stored];
    })()"""

    def shown(held_in):
        return modules.module("residency", code, blocks, {"held_in": held_in})

    (plain,), described, mixed, _ = shown({})
    assert plain[0] == "native" and "in memory;" in described and not mixed
    (one,), described, mixed, stored = shown({name: ["mxfp4"] for name in names})
    assert one == ["mxfp4", plain[1]] and "in memory as mxfp4;" in described
    assert (mixed, stored) == (False, True)
    two, _, mixed, stored = shown({names[0]: ["q4_0"], names[1]: ["q5_0"]})
    assert {name for name, _ in two} == {"q4_0", "q5_0"} and (mixed, stored) == (True, True)
    blocks[0]["formats"] = [format and "int8" for format in blocks[0]["formats"]]
    (both,), _, mixed, stored = shown({names[1]: ["int8"]})
    assert both == ["int8", plain[1]] and (mixed, stored) == (False, False)


def test_slider_positions_round_trip(modules):
    ends = {"floor": 393347073, "top": 405143553}
    there = modules.module("dial", "[...Array(1001).keys()].map((p) => m.bytesAt(p, v[0]))", ends)
    assert (there[0], there[-1]) == (ends["floor"], ends["top"])
    assert sorted(there) == there
    back = modules.module("dial", "v[0].map((size) => m.positionOf(size, v[1]))", there, ends)
    assert back == list(range(1001))
    ticks = modules.module("dial", "m.ticks(v[0])", ends)
    assert 2 <= len(ticks) <= 6 and all(ends["floor"] < size < ends["top"] for size in ticks)
    assert modules.module("dial", "m.ticks({ floor: 5, top: 5 })") == []


def test_slider_ends_at_maximum_useful_memory(modules):
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


def test_slider_marks_formats(modules):
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


def test_only_changes_are_sent(modules):
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
def test_breakdown_parts_fill_budget(modules, total):
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


def test_plan_shows_predicted_cost(modules):
    plan = {"words": "12 int4, exact", "loss": 0.0123, "margin": 0.004, "tokens_per_second": 11.26}
    said = modules.module("breakdown", "v.map(m.planned)", plan, {**plan, "loss": -0.002}, None)
    assert said == [
        "Plan: 12 int4, exact. Predicted: perplexity +1.2% (±0.4%), 11.3 tokens/s.",
        "Plan: 12 int4, exact. Predicted: perplexity -0.2% (±0.4%), 11.3 tokens/s.",
        "",
    ]


def test_layer_names_are_shortened(modules):

    def short(*names):
        return modules.module("residency", "m.shortNames(v[0])", names)

    assert short("model.layers.3.mlp", "model.layers.11.mlp") == ["3", "11"]
    assert short("encoder.block.1.layer.1.mlp", "decoder.block.1.layer.2.mlp") == ["enc 1", "dec 1"]
    assert short("model.encoder.layers.3.ffn", "model.decoder.layers.3.ffn") == ["enc 3", "dec 3"]
    assert short("a.1.b", "a.1.c") == ["0", "1"]


def test_events_are_complete_for_any_chunks(modules):
    stream = 'data: {"text": "é\\n"}\r\n\r\n: comment\n\ndata:a\ndata: b\n\ndata: [DONE]\n\n'
    code = """[...Array(v[0].length).keys()].map((cut) => {
      const reader = new m.EventReader();
      return [...reader.push(v[0].slice(0, cut)), ...reader.push(v[0].slice(cut))];
    })"""
    for events in modules.module("client", code, stream):
        assert events == ['{"text": "é\\n"}', "a\nb", "[DONE]"]


def test_history_has_gaps(modules):
    code = """(() => { const h = new m.History(5);
      v[0].forEach((value) => h.push(value)); return h.path(40, 11); })()"""
    assert (
        modules.module("history", code, [1, 2, None, 4, 0])
        == "M0.0 7.8L10.0 5.5M30.0 1.0L40.0 10.0"
    )
    assert modules.module("history", code, [None]) == ""


def test_rates_are_counter_differences(modules):
    before = {"hits": 10, "fetches": 0, "bytes_read": 100}
    now = {"hits": 13, "fetches": 1, "bytes_read": 300}
    code = "m.between(v[0], v[1], v[2])"
    assert modules.module("history", code, before, now, 2) == {"hitRate": 0.75, "bytesRead": 100}
    idle = {"hitRate": None, "bytesRead": 0}
    assert modules.module("history", code, now, now, 2) == idle
    assert modules.module("history", code, now, before, 2) == {"hitRate": None, "bytesRead": None}


def test_retry_delay_grows_to_limit(modules):
    pauses = modules.module("poller", "[0, 1, 2, 3, 4, 5, 50].map(m.pause)")
    assert pauses == [1000, 1000, 2000, 4000, 8000, 15000, 15000]


def test_drafted_tokens_are_a_sentence(modules):
    known = Pretender().memory()["speculation"]
    code = "m.drafted(v[0], String)"
    expected = (
        "900 of 1200 drafted tokens were right (75%), 4.0 tokens a step that verified a draft."
    )
    assert modules.module("breakdown", code, known) == expected
    assert "yet" in modules.module("breakdown", code, {**known, "drafted": 0, "drafts": 0})
    off = {**known, "active": False, "drafted": 0, "drafts": 0}
    assert modules.module("breakdown", code, off) == ""
    assert modules.module("breakdown", "m.drafted(undefined, String)") == ""


def test_reuse_of_prefixes_is_a_sentence(modules):
    cache = Pretender().memory()["prefix_cache"]
    code = "m.reuse(v[0], String)"
    expected = "Prefixes: 3000 of 4000 prompt tokens reused (75%), 1632 tokens kept."
    assert modules.module("breakdown", code, cache) == expected
    off = {**cache, "active": False, "reason": "switched off"}
    assert modules.module("breakdown", code, off) == "Prefixes are not reused: switched off."
    assert "reused, " in modules.module("breakdown", code, {**cache, "queries": 0})
    assert modules.module("breakdown", "m.reuse(undefined, String)") == ""
